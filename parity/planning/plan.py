"""``tandem plan``: compile both programs for a slice, put the figures together, suggest the smallest slice that fits.

Compiling happens in a process of its own; this one imports jax for arithmetic over shapes only.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loaders.axes import FSDP
from loaders.spec import ModelConfig
from loaders.stage import Stage
from parity.planning.chips import Chip
from parity.planning.copies import copied_cache, copied_weights, uncut_rows
from parity.planning.depths import Depths, depths_of
from parity.planning.environment import compiler_environment, deep_stack
from parity.planning.extrapolating import joined
from parity.planning.meshes import (
    AXES,
    PROGRAMS,
    Workload,
    abstract_mesh,
    default_mesh,
    held,
    rows_on_device,
    specs_for,
    stored_bytes,
    weight_size,
)
from parity.planning.minimum import Minimum, minimum_of

BF16_PASSES = 6  # of a product in float32, as JAX's precision "highest" has it, which models of that dtype run at


class NoSliceHoldsIt(ValueError):
    """No slice's devices have room for weights and cache, so that nothing was compiled."""


@dataclass(frozen=True)
class Request:
    """What to plan. ``subject``: a checkpoint or a config.json; ``quant``: as ``load(quantize=)``."""

    subject: str
    config: ModelConfig
    quant: str | None
    chip: Chip
    load: Workload
    is_exact: bool = False


def plan(request: Request, topology: str | None, sizes: dict[str, int] | None) -> dict[str, Any]:
    """The whole plan, as JSON has it.

    Args:
        request: of what.
        topology: slice; None: the smallest that fits, of those whose devices hold weights and cache; of a mesh that is
            given the smallest that has its devices.
        sizes: of the mesh; None: ``default_mesh``. One that does not fit stays what is planned, and a slice that does
            with ``default_mesh`` is suggested.
    Raises:
        NoSliceHoldsIt: no slice is large enough.
        ValueError: topology and mesh do not fit each other.
    """
    named = topology or (smallest(request) if sizes is None else _holding(request.chip, math.prod(sizes.values())))
    if named is None:
        raise NoSliceHoldsIt(_least(request))
    found, fitting = _planned(request, named, sizes), None
    if sizes is None or not found["fits"]:
        is_default = sizes is None or found["mesh"] == _default(request, request.chip.num_devices(named))
        fitting = _fitting(request, {named: found} if is_default else {})
    if topology is None and sizes is None and fitting is not None:
        found = fitting
    suggestion = fitting and _suggestion(fitting, is_this=fitting is found)
    return found | {"suggestion": suggestion, "is_mesh_given": sizes is not None}


def _holding(chip: Chip, used: int) -> str:
    """The smallest slice of so many devices. Raises ValueError: there is none."""
    for topology in chip.topologies:
        if chip.num_devices(topology) >= used:
            return topology
    raise ValueError(_too_few(chip, chip.topologies[-1], used))


def _default(request: Request, devices: int) -> dict[str, int]:
    return default_mesh(request.config, devices, request.load, request.chip.usable_bytes)


def smallest(request: Request, above: int = 0) -> str | None:
    """The smallest slice of more than ``above`` devices whose devices hold weights and cache."""
    for topology in request.chip.topologies:
        devices = request.chip.num_devices(topology)
        if devices > above and _weight(request, devices) <= request.chip.usable_bytes:
            return topology
    return None


def _fitting(request: Request, plans: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The plan of the smallest slice that fits with its ``default_mesh``, compiled unless it is among ``plans``.

    None: none does.

    Temporaries are no smaller on a smaller slice whose devices hold no less of anything; more devices may hold more,
    where they divide less.
    """
    above = 0
    while (topology := smallest(request, above=above)) is not None:
        above = request.chip.num_devices(topology)
        larger = (one for one in plans.values() if one["devices"] > above)
        more = max((_temporaries(one) for one in larger if _is_cut_as_far(request, one["mesh"], above)), default=0)
        if topology not in plans and _weight(request, above) + more <= request.chip.usable_bytes:
            plans[topology] = _planned(request, topology, None)
        if topology in plans and plans[topology]["fits"]:
            return plans[topology]
    return None


def _is_cut_as_far(request: Request, sizes: dict[str, int], devices: int) -> bool:
    """Whether a device of a mesh has no more of any parameter, or of the rows, than one of so many devices.

    Of a mesh that gathers weights that says nothing of temporaries.
    """
    if FSDP in sizes:
        return False
    config, load = request.config, request.load
    fewer, dims = _default(request, devices), config.dims()
    meshes: list[Any] = [abstract_mesh(sizes), abstract_mesh(fewer)]
    weights = ([weight_size(spec, dims, mesh, load)[0] for mesh in meshes] for spec in specs_for(config, Stage()))
    rows = rows_on_device(load.rows, sizes) <= rows_on_device(load.rows, fewer)
    return rows and all(here <= there for here, there in weights)


def _temporaries(found: dict[str, Any]) -> int:
    return max(program.get("temp_bytes", 0) for program in found["programs"].values())


def _suggestion(found: dict[str, Any], *, is_this: bool) -> dict[str, Any]:
    peaks = {name: program["peak_bytes"] for name, program in found["programs"].items()}
    return {"topology": found["topology"], "mesh": found["mesh"], "is_this": is_this, "peak_bytes": peaks}


def _weight(request: Request, devices: int) -> int:
    return sum(held(request.config, request.load, _default(request, devices)))


def _least(request: Request) -> str:
    """How much too large it is for the slice whose devices hold the least, and what would make it smaller."""
    chip, room = request.chip, request.chip.usable_bytes
    topology = min(chip.topologies, key=lambda topology: _weight(request, chip.num_devices(topology)))
    weights, cache = held(request.config, request.load, _default(request, chip.num_devices(topology)))
    ways = ["another chip"]
    if weights < room:
        ways.append("a smaller --batch or --context")
    if cache < room and request.quant is None and request.config.quantization is None:
        ways.append("--quant nvfp4")
    return (
        f"it does not fit on any slice of {chip.name}: on {topology}, where a device would hold the least, that is"
        f" {weights / 1e9:.1f} GB of weights and {cache / 1e9:.1f} of cache, and it has {room / 1e9:.1f} for a program."
        f" Use {' or '.join(ways)}"
    )


def _too_few(chip: Chip, topology: str, used: int) -> str:
    return f"the mesh takes {used} devices, but {chip.name}:{topology} has {chip.num_devices(topology)}"


def _planned(request: Request, topology: str, sizes: dict[str, int] | None) -> dict[str, Any]:
    config, load, chip = request.config, request.load, request.chip
    devices = chip.num_devices(topology)
    sizes = _default(request, devices) if sizes is None else sizes
    used = math.prod(sizes.values())
    if used > devices:
        raise ValueError(_too_few(chip, topology, used))
    depths = depths_of(config, load.stored, is_exact=request.is_exact)
    answers = _compiled(request, topology, sizes, depths)
    programs = {}
    for program in PROGRAMS:
        figures = joined(answers[program], depths)
        least = minimum_of(config, program, load, sizes)
        programs[program] = figures | judged(figures, least, chip, load, program)
    return {
        "subject": request.subject,
        "architecture": config.architecture,
        "layers": config.num_hidden_layers,
        "parameters": len(specs_for(config, Stage()).params),
        "quant": request.quant,
        "dtype": load.dtype,
        "stored": stored_bytes(config, load),
        "rows": load.rows,
        "context": load.context,
        "prompt": load.prompt,
        "chip": chip.name,
        "topology": topology,
        "devices": devices,
        "mesh": {axis: sizes[axis] for axis in AXES if sizes.get(axis, 1) > 1},
        "hbm_bytes": chip.hbm_bytes,
        "usable_bytes": chip.usable_bytes,
        "extrapolated_from_layers": None if depths.is_exact else [depths.shallow, depths.deeper],
        "fits": all(found["fits"] for found in programs.values()),
        "copied_weights": copied_weights(config, load, sizes),
        "copied_cache": copied_cache(config, load, sizes),
        "uncut_rows": uncut_rows(load.rows, sizes),
        "programs": programs,
        "jax": answers["jax"],
        "libtpu": answers["libtpu"],
    }


def judged(figures: dict[str, Any], least: Minimum, chip: Chip, load: Workload, program: str) -> dict[str, Any]:
    """Whether it fits, how it compares with the least that must move, and the roofline of both."""
    minimum = dataclasses.asdict(least) | {"bytes": least.bytes, "distinct_bytes": least.distinct_bytes}
    if figures["peak_bytes"] is None:
        return {"fits": False, "minimum": minimum}
    moved = figures["hbm_read_bytes"] + figures["hbm_written_bytes"]
    multiplied = least.flops * (BF16_PASSES if load.dtype == "float32" else 1)
    tokens = load.rows * (load.prompt if program == "prefill" else 1)

    def roof(size: float) -> dict[str, float]:
        seconds = max(size / chip.bandwidth, multiplied / chip.flops)
        return {"seconds": seconds, "tokens_per_s": tokens / seconds}

    return {
        "fits": figures["peak_bytes"] <= chip.usable_bytes,
        "hbm_bytes": moved,
        "ratio": round(moved / least.bytes, 4),
        "minimum": minimum,
        "roofline": {"minimum": roof(least.distinct_bytes), "compiled": roof(moved)},
    }


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
            # what is imported here is imported there, whatever lies in the current directory
            [sys.executable, "-P", "-m", "parity.planning.worker", str(result), str(os.getpid())],
            input=json.dumps(asked),
            env=compiler_environment(os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}),
            capture_output=True,
            text=True,
            check=False,
        )
        found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    if "error" in found:
        raise ValueError(found["error"])
    used, chip = math.prod(sizes.values()), request.chip
    failed = [line for line in done.stderr.splitlines() if "RET_CHECK" in line]
    if done.returncode == -signal.SIGABRT and used < chip.num_devices(topology) and failed:  # it aborts over that, too
        raise ValueError(chip.no_part(topology, used, failed[-1]))
    if done.returncode:
        raise RuntimeError(
            f"compiling for {request.chip.name}:{topology} failed ({done.returncode}):\n{done.stderr[-4000:]}"
        )
    return found
