"""What lies on more than one device of a mesh: weights, what is cached, and rows that the mesh does not divide."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from jax_models.abstract import abstract_cache
from loaders.axes import LOGICAL_AXES, axes_of, param_cuts
from loaders.spec import ModelConfig
from loaders.stage import Stage
from parity.planning.meshes import AXES, Workload, abstract_mesh, row_axes, rows_on_device, specs_for, weight_size

Placed = tuple[dict[str, Any], tuple[str, ...], int]  # what an array is, mesh axes that cut it, bytes on one device


def copied_weights(config: ModelConfig, load: Workload, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Weights that more than one device has, by the mesh axes along which they are the same, most bytes first.

    ``axes``: those, with their sizes; ``copies``: devices that have the same part; ``bytes``: of all copies but one,
    on all devices together; ``tensors``: name, shape and ``bytes`` of each, and whether a vision tower has it.
    """
    specs, dims, found = specs_for(config, Stage()), config.dims(), []
    mesh: Any = abstract_mesh(sizes)
    for spec in specs:
        cuts = tuple(axis for cut in param_cuts(spec, dims, sizes) for axis in axes_of(cut))
        is_visual = specs.rules[spec.placements[0].tensor].is_visual
        what = {"name": spec.name, "shape": list(spec.shape), "is_visual": is_visual}
        found.append((what, cuts, weight_size(spec, dims, mesh, load)[1]))
    return _grouped(found, sizes)


def copied_cache(config: ModelConfig, load: Workload, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """The same of what is cached: ``layers.0.key``, ``key_mask``."""
    mesh: Any = abstract_mesh(sizes)
    cache = abstract_cache(config, load.rows, load.context, load.dtype, mesh)
    leaves: dict[str, Any] = {
        f"layers.{layer}.{name}": leaf for layer, parts in cache.layers.items() for name, leaf in parts.items()
    }
    leaves |= {name: getattr(cache, name) for name in ("key_mask", "position", "length")}
    found = []
    for name, leaf in leaves.items():
        cuts = tuple(axis for cut in leaf.sharding.spec for axis in axes_of(cut))
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        found.append(({"name": name, "shape": list(leaf.shape)}, cuts, size))
    return _grouped(found, sizes)


def _grouped(arrays: Iterable[Placed], sizes: dict[str, int]) -> list[dict[str, Any]]:
    devices = math.prod(sizes.values())
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for what, cuts, size in arrays:
        axes = tuple(axis for axis in AXES if sizes.get(axis, 1) > 1 and axis not in cuts)
        copies = math.prod(sizes[axis] for axis in axes)
        if copies > 1:
            extra = size * (devices - devices // copies)
            groups.setdefault(axes, []).append(what | {"bytes": extra})
    found = [
        {
            "axes": {axis: sizes[axis] for axis in axes},
            "copies": math.prod(sizes[axis] for axis in axes),
            "bytes": sum(tensor["bytes"] for tensor in tensors),
            "tensors": tensors,
        }
        for axes, tensors in groups.items()
    ]
    return sorted(found, key=lambda group: -group["bytes"])


def uncut_rows(rows: int, sizes: dict[str, int]) -> dict[str, Any] | None:
    """What a mesh does with rows that it does not divide by all of its axes for them; None: it divides them.

    ``axes``: those that have the same rows on all their devices, with their sizes; ``rows_per_device``;
    ``dividing``: the batches next to this one that all axes divide.
    """
    wanted = [axis for axis in LOGICAL_AXES["B"] if sizes.get(axis, 1) > 1]
    whole = {axis: sizes[axis] for axis in wanted if axis not in row_axes(rows, sizes)}
    if not whole:
        return None
    parts = math.prod(sizes[axis] for axis in wanted)
    below = rows // parts * parts
    dividing = [batch for batch in (below, below + parts) if batch]
    return {"axes": whole, "rows_per_device": rows_on_device(rows, sizes), "dividing": dividing}
