"""Parameters read as the parts of them that one process holds: of every tensor what lies in those, and no more."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loaders.dtypes import to_numpy
from loaders.reading.filling import Filling
from loaders.reading.lots import lots_of_plan
from loaders.reading.progress import reported
from loaders.reading.regions import Box, Region, sizes_of
from loaders.reading.scratch import Staging, memory_of
from loaders.spec import ParamSpec, Placement

Shards = dict[Box, np.ndarray]  # parts of a parameter, each in memory of its own


def region_of(spec: ParamSpec, placement: Placement, box: Box, shard: np.ndarray) -> Region | None:
    """What a tensor has for a shard: its part, and where in the shard it goes; None: nothing.

    Args:
        spec: the parameter.
        placement: the tensor's place in it.
        box: which part of the parameter the shard is.
        shard: of the box's shape.
    """
    held = zip(placement.index, box, strict=False)
    if any(not start <= index < stop for index, (start, stop) in held):
        return None
    lead = len(placement.index)
    place = shard[(*(index - box[axis][0] for axis, index in enumerate(placement.index)), ...)]
    shape, inner = spec.shape[lead:], box[lead:]
    if not spec.is_transposed:
        return Region(shape, inner, place)
    # the tensor's last two axes are swapped: the parameter's last one comes before those its second last is merged of
    axes = list(range(len(shape)))
    axes.insert(len(spec.tensor_shape) - 2, axes.pop())
    return Region(tuple(shape[axis] for axis in axes), tuple(inner[axis] for axis in axes), place.transpose(axes))


def read_shards(filling: Filling, *, staging: Staging | None = None) -> Iterator[tuple[ParamSpec, Shards]]:
    """Read every planned parameter's shards, one parameter after the other as they are complete. None is kept.

    Args:
        filling: accounts for what it has a plan of, with ``boxes_of``; a redundant tied tensor is held against those
            parts of the parameter it is tied to.
        staging: as for ``read_whole``.
    Raises:
        CheckpointError: a file changed or cannot be read, or a tensor that was not asked for.
    """
    plan, boxes_of = filling.plan, filling.plan.boxes_of
    assert boxes_of is not None, "whole parameters are read_whole's"
    specs = {spec.name: spec for spec in plan.specs}
    begun: dict[str, Shards] = {}
    memory = memory_of(plan, lambda spec: map(sizes_of, boxes_of(spec)), staging)

    def empty(spec: ParamSpec, name: str) -> Shards:
        dtype = to_numpy(plan.dtypes[spec.name])
        return {box: memory.take(name, sizes_of(box), dtype) for box in boxes_of(spec)}

    def wanted(tensor: str) -> list[Region]:
        if tensor in plan.verified:
            same_as = specs[plan.verified[tensor]]
            return [Region(same_as.shape, *one) for one in empty(same_as, tensor).items()]
        spec, placement = plan.targets[tensor]
        if spec.name not in begun:
            begun[spec.name] = empty(spec, spec.name)
        found = (region_of(spec, placement, box, shard) for box, shard in begun[spec.name].items())
        return [part for part in found if part is not None]

    tensors = plan.checkpoint.stream_regions(lots_of_plan(plan), wanted, plan.host_budget_bytes)
    tensors = reported(tensors, sum(plan.sizes().values()), str(plan.checkpoint.source), phase=plan.phase)
    for spec, placement, parts, is_complete in filling.receive(memory.releasing(tensors)):
        filling.check(spec, placement, parts)
        if is_complete:
            filling.complete(spec, list(begun[spec.name].values()))
            parts.clear()  # views of the shards, which are the caller's from here on
            memory.release(spec.name)
            yield spec, begun.pop(spec.name)
