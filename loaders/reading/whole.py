"""Parameters read whole into host memory, on both backends."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from loaders.dtypes import to_numpy
from loaders.reading.filling import Filling
from loaders.reading.lots import stream_parameters
from loaders.reading.place import place_of
from loaders.reading.scratch import Staging, memory_of
from loaders.spec import ParamSpec


def read_whole(filling: Filling, *, staging: Staging | None = None) -> Iterator[tuple[ParamSpec, np.ndarray]]:
    """Read every planned parameter, one after the other as they are complete. None is kept.

    Each has its spec's shape and the checkpoint's dtype, in memory of its own, 64-byte aligned, which is the caller's
    and not written here again. A large one has huge pages, which are cheap to write first and go back to the system at
    once.

    Args:
        filling: accounts for what it has a plan of.
        staging: nobody has a parameter any more when the next is asked for, and they are read into this memory, again
            and again; None: each is kept, in its own.
    Raises:
        CheckpointError: a file changed or cannot be read, or a tensor that was not asked for.
    """
    plan = filling.plan
    host: dict[str, np.ndarray] = {}
    memory = memory_of(plan, lambda spec: [spec.shape], staging)

    def make(spec: ParamSpec) -> np.ndarray:
        if spec.name not in host:
            host[spec.name] = memory.take(spec.name, spec.shape, to_numpy(plan.dtypes[spec.name]))
        return host[spec.name]

    def destination(tensor: str) -> np.ndarray | None:
        if tensor not in plan.targets:
            return memory.take_compared(tensor)
        spec, placement = plan.targets[tensor]
        return place_of(make(spec), spec, placement)

    if not plan.staged:  # mapping memory waits for threads that write to what is mapped, so all of it comes first
        for spec, _ in plan.targets.values():
            make(spec)
    tensors = stream_parameters(plan, destination)
    for spec, placement, array, is_complete in filling.receive(memory.releasing(tensors)):
        filling.write(host[spec.name], spec, placement, array)
        if is_complete:
            filling.complete(spec, host[spec.name])
            del array  # a view of the parameter, which is the caller's from here on
            memory.release(spec.name)
            yield spec, host.pop(spec.name)
