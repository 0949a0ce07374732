"""Parts of tensors by index, as NumPy would be asked: a tensor that is larger than memory comes in rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from loaders.reading.regions import Box, Region


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a tensor.

    Attributes:
        name: of the tensor.
        index: as NumPy would be asked, ``tensor[index]``: a tuple of integers, and slices of step 1. Axes that are not
            said are whole. Of packed formats, whose bytes are read, the last axis is that of bytes.

    Raises:
        ValueError: anything else is an index to NumPy, if at all, and to us is none: True, None, ``...``, a list.
    """

    name: str
    index: tuple[int | slice, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.index, tuple) or not all(map(_is_index, self.index)):
            expected = "a tuple of integers and slices of them"
            raise ValueError(f"{self.name!r} is asked for by the index {self.index!r}, expected {expected}")

    def __hash__(self) -> int:
        return hash((self.name, str(self.index)))  # a slice has none before Python 3.12

    def bounds(self, shape: Sequence[int]) -> Box:
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

    def region(self, shape: Sequence[int], out: np.ndarray) -> Region:
        """The part of a tensor of this shape, and ``out`` of the part's, as what is read."""
        kept = (slice(None) if isinstance(one, slice) else None for one in self.index)
        return Region(tuple(shape), self.bounds(shape), out[(*kept, ...)] if self.index else out)


def _is_index(found: object) -> bool:
    if isinstance(found, slice):
        return all(end is None or _is_integer(end) for end in (found.start, found.stop, found.step))
    return _is_integer(found)


def _is_integer(found: object) -> bool:
    """Python's or NumPy's; what is true or false is no position."""
    return isinstance(found, int | np.integer) and not isinstance(found, bool)


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
