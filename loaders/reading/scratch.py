"""Host memory that parameters are read into: where they are not kept, it is used again and again.

Memory that is new is made by the system when it is first written, one page after the other, and that takes longer than
to read into it. So a reload, which looks at each parameter or copies it and is done with it, and a load to a device
have all of them read into the same memory: as much as those of one lot take (see ``loaders.reading.lots``), which would
be there together anyhow. Where parameters stay, each has its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import numpy as np

from loaders.dtypes import to_numpy
from loaders.reading.lots import lots_of_plan
from loaders.reading.memory import aligned_empty
from loaders.reading.plan import LoadPlan
from loaders.spec import ParamSpec

_ALIGNMENT = 8  # enough for any dtype, and no more: a budget is met to the byte
Shape = tuple[int, ...]
Read = TypeVar("Read")
ShapesOf = Callable[[ParamSpec], Iterable[Shape]]


class Staging:
    """Host buffers that are used again: a parameter in them is valid only until the next one is asked for."""

    def empty(self, num_bytes: int) -> np.ndarray:
        """Memory for so many bytes, uint8."""
        return aligned_empty((num_bytes,), np.dtype(np.uint8))

    def settle(self) -> None:
        """Wait for those who read the memory although they were done with it; it is about to be written again."""


class Memory(Protocol):
    """What parameters are read into."""

    def take(self, name: str, shape: Shape, dtype: np.dtype) -> np.ndarray:
        """An array for ``name``, which is its own until ``release``; there may be several."""
        ...

    def take_compared(self, tensor: str) -> np.ndarray | None:
        """Likewise, for a redundant tied tensor as it is in the files; None: it is none, or whatever the stream has."""
        ...

    def releasing(self, tensors: Iterator[tuple[str, Read]]) -> Iterator[tuple[str, Read]]:
        """The same; redundant tied tensors, of which no more than a digest is kept, are released one by one."""
        ...

    def release(self, name: str) -> None:
        """Nobody reads the arrays of ``name`` any more when the next is taken."""
        ...


class Kept:
    """Memory of parameters that are the reader's from when they are complete: every array has its own."""

    def take(self, name: str, shape: Shape, dtype: np.dtype) -> np.ndarray:
        return aligned_empty(shape, dtype)

    def take_compared(self, tensor: str) -> np.ndarray | None:
        return None

    def releasing(self, tensors: Iterator[tuple[str, Read]]) -> Iterator[tuple[str, Read]]:
        return tensors

    def release(self, name: str) -> None:
        pass


class Scratch:
    """Memory of what is read in one lot, taken from the staging when the first array is asked for.

    Args:
        plan: what is read, parameter by parameter.
        shapes_of: of the arrays that a parameter is read into, or a redundant tied tensor that must equal it.
        staging: what kind of memory it is.
    """

    def __init__(self, plan: LoadPlan, shapes_of: ShapesOf, staging: Staging) -> None:
        assert plan.staged, "of parameters that stay all may be begun at once"
        self._plan, self._shapes_of, self._staging = plan, shapes_of, staging
        self._specs = {spec.name: spec for spec in plan.specs}
        self._size = max(map(self._lot_bytes, lots_of_plan(plan)), default=0)
        self._memory: np.ndarray | None = None
        self._used = 0
        self._held: set[str] = set()

    def take(self, name: str, shape: Shape, dtype: np.dtype) -> np.ndarray:
        if not self._held and self._used:
            self._staging.settle()
            self._used = 0
        self._held.add(name)
        start, stop = self._used, self._used + _room(shape, dtype)
        if stop > self._size:  # a tensor of an earlier lot never came, and is waited for to the end
            return aligned_empty(shape, dtype)
        if self._memory is None:
            self._memory = self._staging.empty(self._size)
        self._used = stop
        return self._memory[start : start + _num_bytes(shape, dtype)].view(dtype).reshape(shape)

    def take_compared(self, tensor: str) -> np.ndarray | None:
        if tensor not in self._plan.verified:
            return None
        checkpoint = self._plan.checkpoint
        return self.take(tensor, checkpoint.stored_shape(tensor), to_numpy(checkpoint.tensors[tensor].dtype))

    def releasing(self, tensors: Iterator[tuple[str, Read]]) -> Iterator[tuple[str, Read]]:
        for name, array in tensors:
            yield name, array
            del array
            if name in self._plan.verified:
                self.release(name)

    def release(self, name: str) -> None:
        self._held.discard(name)

    def _lot_bytes(self, tensors: set[str]) -> int:
        verified, targets, dtypes = self._plan.verified, self._plan.targets, self._plan.dtypes
        params = {targets[name][0].name for name in tensors if name in targets}
        found = [*params, *(verified[name] for name in tensors if name in verified)]
        return sum(
            _room(shape, to_numpy(dtypes[name])) for name in found for shape in self._shapes_of(self._specs[name])
        )


def memory_of(plan: LoadPlan, shapes_of: ShapesOf, staging: Staging | None) -> Memory:
    """What a plan is read into; see ``Scratch``. ``staging``: None: it stays there."""
    return Kept() if staging is None else Scratch(plan, shapes_of, staging)


def _num_bytes(shape: Shape, dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _room(shape: Shape, dtype: np.dtype) -> int:
    return -(-_num_bytes(shape, dtype) // _ALIGNMENT) * _ALIGNMENT
