"""Run as a program: every family's prefill and decode compiled for one chip, and what came of them as JSON.

    python tests/jax_models/compile_families.py CHIP RESULT CONFIG...

A configuration is a config.json; one whose name ends in ``-nvfp4`` is compiled with its weights quantised, and in
``-float32`` computes in that.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from parity.planning.environment import compiler_environment

os.environ.update(compiler_environment(os.environ))  # before jax is imported

import jax
import jax.numpy as jnp

from jax_models.abstract import abstract_cache, abstract_rows, abstract_weights
from jax_models.batch import Batch
from jax_models.frames import VisionArrays
from jax_models.layers.vision import Shown
from jax_models.programs import programs_for
from loaders.stage import Stage
from parity.planning.chips import chip_of
from parity.planning.compiling import measured, mesh_on
from parity.planning.meshes import PROGRAMS, Workload
from parity.planning.minimum import minimum_of
from parity.planning.subject import planned

MESH = {"expert": 2, "tensor": 2}
LOAD = Workload(rows=8, context=1024, prompt=640, dtype="bfloat16")  # long enough for the kernels of attention
ROWS_OF_PATCHES, PATCHES = 2, 64


def seen(config: Any, mesh: jax.sharding.Mesh) -> bool:
    """Whether a prompt with images compiles."""
    tower = config.vision
    numbers = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def whole(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    lead = (ROWS_OF_PATCHES, PATCHES)
    shown = Shown(
        whole(*lead, numbers, dtype=jnp.float32),
        whole(*lead, 2),
        whole(*lead, 4),
        whole(*lead, 4, dtype=jnp.float32),
        whole(*lead),
    )
    B, T = LOAD.rows, LOAD.prompt
    rows = [abstract_rows((B, T), kind, mesh) for kind in (jnp.int32, jnp.bool_, jnp.int32)]
    vision = VisionArrays(shown, rows[0], abstract_rows((B,), jnp.int32, mesh))  # pyright: ignore[reportArgumentType]
    weights = abstract_weights(config, mesh, jnp.bfloat16)
    cache = abstract_cache(config, B, LOAD.context, jnp.bfloat16, mesh)
    prefill = programs_for(config, Stage(), jnp.dtype(jnp.bfloat16), mesh).prefill
    return prefill.lower(weights, Batch(*rows, vision), cache=cache).compile().as_text() is not None


def main() -> None:
    """Write a line for each program that compiled; the first that does not ends it all."""
    chip, result = chip_of(sys.argv[1]), Path(sys.argv[2])
    mesh = mesh_on(chip, chip.host, MESH)
    found: dict[str, Any] = {}
    for path in map(Path, sys.argv[3:]):
        config = planned(str(path), "nvfp4" if "-nvfp4" in path.stem else None).config
        load = replace(LOAD, dtype="float32") if path.stem.endswith("-float32") else LOAD
        for program in PROGRAMS:
            hlo = result.with_suffix(".hlo")
            figures = measured(config, program, load, mesh, hlo=str(hlo))
            for kernel in ("splash", "attend_held"):
                figures[kernel] = len(re.findall(rf"%{kernel}\S* = .* custom-call\(", hlo.read_text("utf-8")))
            least = minimum_of(config, program, load, MESH).bytes
            found[f"{path.stem} {program}"] = figures | {"least_bytes": least}
        if getattr(config, "vision", None) is not None:
            with jax.set_mesh(mesh):
                found[f"{path.stem} images"] = seen(config, mesh)
    result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
