"""Run as a program: what adapters do to an embedding, compiled for one chip, and what it takes as JSON.

python tests/jax_models/compile_adapters.py CHIP RESULT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from parity.planning.environment import compiler_environment

os.environ.update(compiler_environment(os.environ))  # before jax is imported

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_models.adapter_room import Copies, layers_of
from jax_models.layers.linear import Embedding
from jax_models.layers.lora import Stacks
from parity.planning.chips import chip_of
from parity.planning.compiling import mesh_on

SLOTS, VOCABULARY, RANK, WIDTH = 2, 151_936, 16, 1024


def main() -> None:
    chip, result = chip_of(sys.argv[1]), Path(sys.argv[2])
    mesh = mesh_on(chip, chip.host, {"tensor": 1})

    def given(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def added(stacks: Stacks, ids_BT: jax.Array) -> jax.Array:
        return stacks.looked_up(ids_BT, 0) + stacks.looked_up(ids_BT, 1)

    stacks: Any = Stacks(given(SLOTS, VOCABULARY, RANK), given(SLOTS, WIDTH, RANK), given(SLOTS))  # of no values
    copies: Any = Copies({"weight": given(SLOTS, VOCABULARY, WIDTH, dtype=jnp.bfloat16)}, given(SLOTS + 1))

    def brought(copies: Copies, ids_BT: jax.Array) -> jax.Array:
        tables = layers_of(nnx.eval_shape(lambda: Embedding(VOCABULARY, WIDTH)), copies)
        return tables[0](ids_BT, jnp.bfloat16) + tables[1](ids_BT, jnp.bfloat16)

    found = {}
    for what, program, given_ in (("added", added, stacks), ("brought", brought, copies)):
        took = jax.jit(program).lower(given_, given(8, 1, dtype=jnp.int32)).compile().memory_analysis()
        assert took is not None
        found[what] = took.temp_size_in_bytes
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
