"""Parts of tensors: hyper-rectangles, and the stretches of bytes that they are in a file.

A process of many reads no more than its devices hold, and a tensor that is larger than memory comes in rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from loaders import memory

Bounds = tuple[tuple[int, int], ...]  # [start, stop) on every axis


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a tensor.

    Attributes:
        name: of the tensor.
        index: as NumPy would be asked, ``tensor[index]``: integers, and slices of step 1. Axes that are not said are
            whole. Of packed formats, whose bytes are read, the last axis is that of bytes.
    """

    name: str
    index: tuple[int | slice, ...] = ()

    def __hash__(self) -> int:
        return hash((self.name, str(self.index)))  # a slice has none before Python 3.12

    def bounds(self, shape: Sequence[int]) -> Bounds:
        """What it is of a tensor of this shape, an integer as a range of one.

        Raises:
            IndexError: more indices than axes, an integer beyond its axis, or a step.
        """
        if not self.index:
            return tuple((0, size) for size in shape)
        if len(self.index) > len(shape):
            raise IndexError(
                f"{self.name!r} has shape {tuple(shape)}, which {len(self.index)} indices are too many for"
            )
        found = []
        for one, size in itertools.zip_longest(self.index, shape, fillvalue=slice(None)):
            assert isinstance(size, int)
            if isinstance(one, slice):
                start, stop, step = one.indices(size)
                if step != 1:
                    raise IndexError(f"{self.name!r} is asked for in steps of {step}, expected 1")
                found.append((start, max(start, stop)))
            elif -size <= one < size:
                found.append((one % size, one % size + 1))
            else:
                raise IndexError(f"{self.name!r} has shape {tuple(shape)}, and no index {one} on an axis of {size}")
        return tuple(found)

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the part, without the axes that integers take out."""
        if not self.index:
            return tuple(shape)
        kept = itertools.zip_longest(self.bounds(shape), self.index[: len(shape)], fillvalue=slice(None))
        return tuple(stop - start for (start, stop), one in kept if isinstance(one, slice))  # pyright: ignore[reportGeneralTypeIssues, reportAssignmentType]


def runs(shape: Sequence[int], itemsize: int, bounds: Bounds) -> Iterator[tuple[int, int]]:
    """The stretches of bytes that a part is, in order: where each begins, counted from the tensor, and its length."""
    sizes = [stop - start for start, stop in bounds]
    if 0 in sizes:
        return
    inner = len(shape)  # from here on axes are whole
    while inner and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    strides = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
    if not inner:
        yield 0, math.prod(shape) * itemsize
        return
    cut = inner - 1  # the last axis that is not: a run is a range of it
    length = sizes[cut] * strides[cut]
    for outer in itertools.product(*(range(start, stop) for start, stop in bounds[:cut])):
        yield sum(i * stride for i, stride in zip((*outer, bounds[cut][0]), strides, strict=False)), length


def pieces_of(out: np.ndarray, part: Slice, shape: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Views that together are ``out``, the part of a tensor, each with the byte of the tensor that it begins at.

    As ``loaders.memory.pieces``, which it is for a whole tensor; a part has to be C-contiguous.
    """
    if not part.index or not out.size:
        return memory.pieces(out)
    return _pieces_of_runs(out, runs(shape, out.itemsize, part.bounds(shape)))


def _pieces_of_runs(out: np.ndarray, found: Iterator[tuple[int, int]]) -> Iterator[tuple[int, np.ndarray]]:
    flat = out.reshape(-1).view(np.uint8)
    done = 0
    for position, length in found:
        for start in range(0, length, memory.STAGING_BYTES):
            size = min(memory.STAGING_BYTES, length - start)
            yield position + start, flat[done : done + size]
            done += size


def in_parts(name: str, shape: Sequence[int], itemsize: int, most_bytes: int) -> Iterator[Slice]:
    """A tensor in parts of at most ``most_bytes``, in order: whole if it fits, else some rows at a time.

    Raises:
        ValueError: one element is larger.
    """
    sizes = [math.prod(shape[axis:]) * itemsize for axis in range(len(shape) + 1)]  # of a row of so many indices
    if sizes[0] <= most_bytes:
        yield Slice(name)
        return
    axis = next((axis for axis, size in enumerate(sizes) if size <= most_bytes), None)
    if axis is None:
        raise ValueError(f"{name!r} has elements of {itemsize} bytes, which do not fit into {most_bytes}")
    rows = most_bytes // sizes[axis]
    for outer in np.ndindex(*shape[: axis - 1]):
        for start in range(0, shape[axis - 1], rows):
            yield Slice(name, (*outer, slice(start, min(start + rows, shape[axis - 1]))))
