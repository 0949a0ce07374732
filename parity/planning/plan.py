"""``tandem plan``: compile both programs for a slice, put the figures together, suggest the smallest slice that fits.

Compiling happens in a process of its own; this one imports jax for arithmetic over shapes only.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_models.sharding import MESH_AXES, replicated
from loaders.spec import ModelConfig
from loaders.stage import Stage
from parity.planning.chips import Chip
from parity.planning.compiling import PROGRAMS
from parity.planning.depths import Depths, depths_of
from parity.planning.environment import compiler_environment, deep_stack
from parity.planning.extrapolating import joined
from parity.planning.meshes import Load, abstract_mesh, default_mesh, held, specs_for, stored_bytes
from parity.planning.minimum import Minimum, minimum_of

_SPARE = 0.03  # of what is held, for temporaries nobody has compiled yet


@dataclass(frozen=True)
class Request:
    """What to plan. ``subject``: a checkpoint or a config.json; ``quant``: as ``load(quantize=)``."""

    subject: str
    config: ModelConfig
    quant: str | None
    chip: Chip
    load: Load
    is_exact: bool = False


def plan(request: Request, topology: str | None, sizes: dict[str, int] | None) -> dict[str, Any]:
    """The whole plan, as JSON has it.

    Args:
        request: of what.
        topology: slice; None: the smallest that should fit.
        sizes: of the mesh; None: ``default_mesh``.
    Raises:
        ValueError: topology and mesh do not fit each other, or no slice is large enough.
    """
    named = topology or smallest(request)
    if named is None:
        raise ValueError(f"no slice of {request.chip.name} holds it: {_least(request)}. Use another chip or --quant")
    found = _planned(request, named, sizes)
    found["suggestion"] = _suggested(request, found) if sizes is None else None
    return found


def smallest(request: Request, spare: float = _SPARE, above: int = 0) -> str | None:
    """The smallest slice of more than ``above`` devices whose devices hold weights and cache, with so much to spare."""
    for topology in request.chip.topologies:
        devices = request.chip.num_devices(topology)
        if devices > above and _weight(request, devices) * (1 + spare) <= request.chip.usable_bytes:
            return topology
    return None


def _weight(request: Request, devices: int) -> int:
    return sum(held(request.config, request.load, default_mesh(request.config, devices, request.load)))


def _least(request: Request) -> str:
    topology = request.chip.topologies[-1]
    size = _weight(request, request.chip.num_devices(topology))
    return f"on {topology} a device would hold {size / 1e9:.1f} GB of {request.chip.usable_bytes / 1e9:.1f}"


def _planned(request: Request, topology: str, sizes: dict[str, int] | None) -> dict[str, Any]:
    config, load, chip = request.config, request.load, request.chip
    devices = chip.num_devices(topology)
    sizes = default_mesh(config, devices, load) if sizes is None else sizes
    used = math.prod(sizes.values())
    if used > devices:
        raise ValueError(f"the mesh takes {used} devices, but {chip.name}:{topology} has {devices}")
    depths = depths_of(config, is_exact=request.is_exact)
    answers = _compiled(request, topology, sizes, depths)
    whole = abstract_mesh(sizes)
    specs = specs_for(config, Stage())
    programs = {}
    for program in PROGRAMS:
        figures = joined(answers[program], depths)
        least = minimum_of(config, program, load, sizes)
        programs[program] = figures | judged(figures, least, chip, load, program)
    return {
        "subject": request.subject,
        "architecture": config.architecture,
        "layers": config.num_hidden_layers,
        "quant": request.quant,
        "dtype": load.dtype,
        "stored": stored_bytes(config, load),
        "rows": load.rows,
        "context": load.context,
        "prompt": load.prompt,
        "chip": chip.name,
        "topology": topology,
        "devices": devices,
        "mesh": {axis: sizes[axis] for axis in MESH_AXES if sizes.get(axis, 1) > 1},
        "hbm_bytes": chip.hbm_bytes,
        "usable_bytes": chip.usable_bytes,
        "extrapolated_from_layers": None if depths.is_exact else [depths.shallow, depths.deeper],
        "fits": all(found["fits"] for found in programs.values()),
        "replicated": replicated(specs.params, config.dims(), whole),
        "replicated_cache": _whole_cache(config, load, whole),
        "programs": programs,
        "jax": answers["jax"],
        "libtpu": answers["libtpu"],
    }


def _whole_cache(config: ModelConfig, load: Load, mesh: Any) -> bool:
    """Whether heads of keys and values lie on every device although there is an axis to cut them by."""
    from jax_models.abstract import abstract_cache

    cache = abstract_cache(config, load.rows, load.context, load.dtype, mesh)
    tensor = mesh.shape["expert"] * mesh.shape["tensor"]
    kept = [leaf for parts in cache.layers.values() for name, leaf in parts.items() if name in ("key", "value")]
    return tensor > 1 and any(leaf.sharding.shard_shape(leaf.shape)[1] == leaf.shape[1] for leaf in kept)


def judged(figures: dict[str, Any], least: Minimum, chip: Chip, load: Load, program: str) -> dict[str, Any]:
    """Whether it fits, how it compares with the least that must move, and the roofline of both."""
    minimum = dataclasses.asdict(least) | {"bytes": least.bytes, "distinct_bytes": least.distinct_bytes}
    if figures["peak_bytes"] is None:
        return {"fits": False, "minimum": minimum}
    moved = figures["hbm_read_bytes"] + figures["hbm_written_bytes"]
    tokens = load.rows * (load.prompt if program == "prefill" else 1)

    def roof(size: float) -> dict[str, float]:
        seconds = max(size / chip.bandwidth, least.flops / chip.flops)
        return {"seconds": seconds, "tokens_per_s": tokens / seconds}

    return {
        "fits": figures["peak_bytes"] <= chip.usable_bytes,
        "hbm_bytes": moved,
        "ratio": round(moved / least.bytes, 4),
        "minimum": minimum,
        "roofline": {"minimum": roof(least.distinct_bytes), "compiled": roof(moved)},
    }


def _suggested(request: Request, found: dict[str, Any]) -> dict[str, Any] | None:
    """The smallest slice that fits, compiled if it is another than the one planned; None: none does."""
    overhead = [
        program["peak_bytes"] / (program["weight_bytes"] + program["cache_bytes"]) - 1
        for program in found["programs"].values()
        if program["peak_bytes"]
    ]
    topology = smallest(request, max([_SPARE, *overhead]))
    while topology is not None:
        if topology == found["topology"]:
            if found["fits"]:
                return {"topology": topology, "mesh": found["mesh"], "is_this": True}
        else:
            tried = _planned(request, topology, None)
            peaks = {name: one["peak_bytes"] for name, one in tried["programs"].items()}
            if tried["fits"]:
                return {"topology": topology, "mesh": tried["mesh"], "is_this": False, "peak_bytes": peaks}
        topology = smallest(request, above=request.chip.num_devices(topology))
    return None


def _compiled(request: Request, topology: str, sizes: dict[str, int], depths: Depths) -> dict[str, Any]:
    """Ask a process of its own; see ``parity.planning.worker``."""
    asked = {
        "subject": request.subject,
        "quant": request.quant,
        "chip": request.chip.name,
        "topology": topology,
        "mesh": sizes,
        "load": dataclasses.asdict(request.load),
        "programs": PROGRAMS,
        "depths": sorted({depths.shallow, depths.deeper}),
    }
    with tempfile.TemporaryDirectory() as directory, deep_stack():
        result = Path(directory) / "found.json"
        done = subprocess.run(
            [sys.executable, "-m", "parity.planning.worker", str(result)],
            input=json.dumps(asked),
            env=compiler_environment(os.environ),
            capture_output=True,
            text=True,
            check=False,
        )
        found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    if "error" in found:
        raise ValueError(found["error"])
    if done.returncode:
        raise RuntimeError(
            f"compiling for {request.chip.name}:{topology} failed ({done.returncode}):\n{done.stderr[-4000:]}"
        )
    return found
