"""Compile serving programs for TPUs that are not there, and read off what the compiler made of them.

Call ``parity.planning.environment.prepare_environment`` before this is imported.
Needs ``libtpu`` (the ``tpu-compiler`` extra), no TPU and no weights.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from jax_models.abstract import abstract_cache, abstract_rows, abstract_weights
from jax_models.batch import Batch
from jax_models.programs import programs_for
from loaders.dtypes import to_numpy
from loaders.quantization.schemes import activations_of
from loaders.spec import ModelConfig
from loaders.stage import Stage
from parity.hlo.layers import traffic_by_layer
from parity.hlo.traffic import Traffic
from parity.planning.chips import Chip
from parity.planning.meshes import Workload, held_bytes, mesh_shape

# of the compiler: what is in use beside arguments, or in all
_EXHAUSTED = re.compile(r"(?:Used |HLO temporaries \()([\d.]+)([A-Z]?)")
_IN_HBM = re.compile(r"^Memory Space: default .*\nTotal bytes: (\d+)", re.MULTILINE)  # of its report
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50, "E": 2**60}
_ARRAYS = re.compile(r"\b(pred|bf16|[sfu]\d+)\[([\d,]*)\]")


def mesh_on(chip: Chip, topology: str, sizes: dict[str, int]) -> Mesh:
    """A mesh over the first devices of a slice that need not exist.

    Raises:
        ValueError: the slice has fewer devices than the mesh, or is none of this chip.
    """
    shape, devices = mesh_shape(sizes), chip.num_devices(topology)
    size = math.prod(shape.values())
    if size > devices:
        spelled = ", ".join(f"{axis}={count}" for axis, count in sizes.items())
        raise ValueError(f"the mesh {spelled} takes {size} devices; {chip.name}:{topology} has {devices}")
    is_part = devices < chip.num_devices(chip.host)
    found = topologies.get_topology_desc(f"{chip.name}:{chip.host if is_part else topology}", platform="tpu").devices
    return Mesh(np.array(found[:size]).reshape(tuple(shape.values())), tuple(shape))


def lowered_of(config: ModelConfig, stage: Stage, program: str, load: Workload, mesh: Mesh) -> jax.stages.Lowered:
    """Prefill of a prompt into an empty cache, or one decode step over a full one."""
    dtype = jnp.dtype(load.dtype)
    programs = programs_for(config, stage, dtype, mesh, activations_of(config.quantization))
    weights = abstract_weights(config, mesh, to_numpy(load.plain), stage, load.stored)
    cache = abstract_cache(config, load.rows, load.context, dtype, mesh, stage)
    if program == "decode":
        return programs.decode.lower(weights, abstract_rows((load.rows, 1), jnp.int32, mesh), cache=cache)
    ids = abstract_rows((load.rows, load.prompt), jnp.int32, mesh)
    mask = abstract_rows((load.rows, load.prompt), jnp.bool_, mesh)
    return programs.prefill.lower(weights, Batch(ids, mask, ids), cache=cache)


def measured(
    config: ModelConfig, program: str, load: Workload, mesh: Mesh, stage: Stage | None = None, *, hlo: str | None = None
) -> dict[str, Any]:
    """What the compiler made of one program, per device.

    ``hlo``: file to write the optimised program to. A program that needs more memory than a device has is compiled no
    further: ``out_of_memory_bytes`` is then all there is besides times and what is held.
    """
    stage, dtype = stage or Stage(), jnp.dtype(load.dtype)
    weights = abstract_weights(config, mesh, to_numpy(load.plain), stage, load.stored)
    started = time.perf_counter()
    found: dict[str, Any] = {
        "layers": len(stage.layers(config.num_hidden_layers)),
        "weight_bytes": held_bytes(weights),
        "cache_bytes": held_bytes(abstract_cache(config, load.rows, load.context, dtype, mesh, stage)),
    }
    with jax.set_mesh(mesh):  # kernels ask it which chip they are for
        lowered = lowered_of(config, stage, program, load, mesh)
        found["lower_s"] = time.perf_counter() - started
        try:
            compiled, memory = _compiled(lowered)
        except jax.errors.JaxRuntimeError as error:
            needed = exhausted_bytes(str(error))
            if needed is None:
                raise
            found["compile_s"] = time.perf_counter() - started - found["lower_s"]
            return found | {"out_of_memory_bytes": needed}
    found["compile_s"] = time.perf_counter() - started - found["lower_s"]
    # what no argument is made of, as the vision tower of a text program, lies in HBM all the same
    memory["peak_bytes"] += max(0, found["weight_bytes"] + found["cache_bytes"] - memory["argument_bytes"])
    text = compiled.as_text()
    assert text is not None
    if hlo:
        Path(hlo).write_text(text, encoding="utf-8")
    by_layer, traffic = traffic_by_layer(text, _layer_names(config)), Traffic()
    for one in by_layer.values():
        traffic.add(one)
    return found | {
        **memory,
        **moved(traffic),
        "by_layer": {str(layer): moved(one) for layer, one in sorted(by_layer.items())},
        "unknown_loops": traffic.unknown_loops,
        "full_vocabulary": []
        if program == "decode"
        else full_vocabulary(text, config.vocab_size, config.hidden_size, load.prompt, mesh.size),
        "hlo_lines": text.count("\n"),
    }


def exhausted_bytes(message: str) -> int | None:
    """What a program takes for which there is not enough memory, as the compiler says; None: it says something else."""
    found = _EXHAUSTED.search(message)
    return int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else None


def _compiled(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, dict[str, int]]:
    """A program, and its bytes in HBM: of arguments, results, results in an argument's place, temporaries, and in all.

    In all is what libtpu's report of its buffers says, and temporaries are what of that is neither argument nor result,
    with the room between them that nothing fits into. Of ``memory_analysis``, ``temp_size_in_bytes`` counts that room
    twice, and is 0 where all temporaries are small; ``peak_memory_in_bytes`` leaves it out, and counts arrays in VMEM.
    """
    with tempfile.TemporaryDirectory() as directory:
        compiled = lowered.compile(compiler_options={"xla_dump_to": directory})
        reports = [path.read_text(encoding="utf-8") for path in Path(directory).glob("*-memory-usage-report.txt")]
    analysis = compiled.memory_analysis()
    assert analysis is not None
    names = ("argument", "output", "alias")
    found = {f"{name}_bytes": getattr(analysis, f"{name}_size_in_bytes") for name in names}
    kept = found["argument_bytes"] + found["output_bytes"] - found["alias_bytes"]
    said = [int(total[1]) for total in map(_IN_HBM.search, reports) if total]
    if not said:
        raise RuntimeError("libtpu left no report of its buffers, expected one *-memory-usage-report.txt")
    counted_twice = analysis.temp_size_in_bytes
    return compiled, found | {"temp_bytes": max(said) - kept, "temp_size_bytes": counted_twice, "peak_bytes": max(said)}


def moved(traffic: Traffic) -> dict[str, Any]:
    """As figures have it."""
    return {
        "hbm_read_bytes": traffic.read_bytes,
        "hbm_written_bytes": traffic.written_bytes,
        "collectives": traffic.collectives,
    }


def _layer_names(config: ModelConfig) -> Callable[[str], int | None]:
    """The decoder layer of an argument of ``Programs`` by what JAX calls it."""
    path = "".join(f"['{part}']" for part in config.text_paths[0].split("."))
    name = re.compile(rf"(?:weights{re.escape(path)}\['layers'\]|cache\.layers)\['(\d+)'\]")

    def layer_of(source: str) -> int | None:
        found = name.match(source)
        return int(found[1]) if found else None

    return layer_of


def full_vocabulary(hlo: str, vocab_size: int, hidden_size: int, length: int, parts: int) -> list[str]:
    """Arrays that have an axis of the vocabulary (or a device's part of it) and one of the prompt, but its tables."""
    if length == 1:  # of which the last token is all
        return []
    vocabulary = {vocab_size, vocab_size // parts}
    arrays = {(kind, tuple(map(int, filter(None, dims.split(","))))) for kind, dims in _ARRAYS.findall(hlo)}
    tables = {(size, hidden_size) for size in vocabulary}
    found = [(kind, dims) for kind, dims in arrays if dims not in tables and {*dims} & vocabulary and length in dims]
    return sorted(f"{kind}[{','.join(map(str, dims))}]" for kind, dims in found)
