"""Run as a program: attention over a cache compiled for one chip in odd sizes, and what came of each as JSON.

python tests/jax_models/compile_attention.py CHIP RESULT
"""

from __future__ import annotations

import json
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from parity.planning.environment import compiler_environment

os.environ.update(compiler_environment(os.environ))  # before jax is imported

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_models.kernels.heads import cuts_of
from jax_models.layers.cached_attention import Given, attend_joined
from parity.planning.chips import chip_of
from parity.planning.compiling import mesh_on

# rows, tokens, query heads, heads of keys, slots, width, what of a 2 x 2 mesh is cut by what
CASES: dict[str, tuple[int, int, int, int, int, int, dict[str, int]]] = {
    "one head": (1, 1, 1, 1, 512, 128, {"tensor": 1}),
    "odd heads": (3, 1, 15, 3, 700, 128, {"tensor": 1}),
    "many queries of one": (2, 8, 16, 1, 1000, 128, {"tensor": 1}),
    "wide heads": (8, 3, 8, 4, 1024, 256, {"tensor": 4}),
    "many heads": (8, 1, 64, 32, 640, 128, {"tensor": 1}),
    "as much as VMEM is given": (2, 8, 32, 32, 640, 128, {"tensor": 1}),
    "the same of wide heads": (2, 8, 16, 16, 640, 256, {"tensor": 1}),
    "scores of many queries": (1, 8, 128, 1, 8192, 128, {"tensor": 1}),
    "keys everywhere": (8, 2, 8, 2, 2048, 128, {"expert": 2, "tensor": 2}),
    "rows cut": (8, 1, 32, 8, 32768, 128, {"data": 2, "tensor": 2}),
}


def compiled(mesh: Mesh, B: int, T: int, N: int, K: int, S: int, H: int) -> dict[str, Any]:
    cuts = cuts_of(mesh, B, N, K)

    def given(*shape: int, dtype: Any = jnp.bfloat16, by: tuple[Any, ...] = ()) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*by)))

    new, held = [(cuts.rows, None, by) for by in (cuts.by_query, cuts.by_key)], (cuts.rows, cuts.by_key)
    arguments = Given(
        given(B, T, N, H, by=new[0]),
        *(given(B, T, K, H, by=new[1]) for _ in "kv"),
        given(dtype=jnp.int32),
        given(B, T, S, dtype=jnp.bool_, by=(cuts.rows,)),
        *(given(B, K, S, H, by=held) for _ in "kv"),
    )
    attend = jax.jit(partial(attend_joined, scale=0.1, softcap=5.0, mesh=mesh))
    found = attend.lower(arguments).compile()
    return {
        "kernels": len(re.findall(r"%attend_held\S* = .* custom-call\(", found.as_text())),
        "temp_bytes": found.memory_analysis().temp_size_in_bytes,
        "cache_bytes": 2 * B * K * S * H * 2,
    }


def main() -> None:
    chip, result = chip_of(sys.argv[1]), Path(sys.argv[2])
    found = {name: compiled(mesh_on(chip, chip.host, axes), *sizes) for name, (*sizes, axes) in CASES.items()}
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
