"""Run as a program: what adapters add to an embedding, compiled for one chip, and what it takes as JSON.

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
from jax.sharding import NamedSharding, PartitionSpec

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
    found = jax.jit(added).lower(stacks, given(8, 1, dtype=jnp.int32)).compile().memory_analysis()
    assert found is not None
    result.write_text(json.dumps({"temp_bytes": found.temp_size_in_bytes}), encoding="utf-8")


if __name__ == "__main__":
    main()
