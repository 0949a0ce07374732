"""Regions of tensors: the byte ranges that they are in a file, and where the values in those go.

All that is read of a checkpoint is one: a tensor, some rows of it, the columns that a device holds. Rows lie together
and are read straight into place. Columns lie apart: with much between them they are read one by one, with little the
rows are read through, some at a time, and what is not wanted is dropped. Rows that several regions have columns of are
read once.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from loaders.reading import memory
from loaders.reading.memory import bits, fill

Box = tuple[tuple[int, int], ...]  # start and stop along every axis
DENSE_GAP_BYTES = 64 << 10  # read through where most of it is wanted: a copy of so much costs what a piece does


@dataclass(frozen=True, eq=False)
class Region:
    """A part of a tensor, and where it goes.

    Attributes:
        shape: the tensor's, perhaps with axes split that it has merged.
        box: the part, along those axes.
        out: writable array of the part's shape, strided or not, in the dtype that the tensor is read in.
    """

    shape: tuple[int, ...]
    box: Box
    out: np.ndarray

    def take(self, whole: np.ndarray) -> None:
        """Fill ``out`` from the tensor, where that is in memory."""
        fill(self.out, whole.reshape(self.shape)[tuple(slice(*ends) for ends in self.box)])


class Taker(NamedTuple):
    """Values among the bytes of a piece, and where they go.

    Attributes:
        out: strided or not.
        offset: of the first value, in bytes from the beginning of the piece.
        strides: of the values there, in bytes.
    """

    out: np.ndarray
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """Bytes that lie together in a tensor, to be read at once.

    Attributes:
        position: of the first byte.
        num_bytes: of them, also those between values that are wanted.
        place: where all of them go as they are, flat uint8; None: ``take`` has to be told what they are.
        takers: what is wanted of them; none where they are read for nothing.
    """

    position: int
    num_bytes: int
    place: np.ndarray | None = None
    takers: tuple[Taker, ...] = ()

    def take(self, raw: np.ndarray) -> None:
        """Put what is wanted of ``num_bytes`` bytes, uint8, where it goes. Nothing of ``raw`` is kept."""
        if self.place is not None:
            self.place[...] = raw
        for out, offset, strides in self.takers:
            fill(out, np.ndarray(out.shape, bits(out).dtype, raw.data, offset, strides))

    def joined(self, other: Piece) -> Piece | None:
        """One for both, where they have bytes in common and neither goes straight into place."""
        end = max(self.position + self.num_bytes, other.position + other.num_bytes)
        shares = self.position <= other.position < self.position + self.num_bytes
        fits = end - self.position <= memory.STAGING_BYTES
        if not (shares and fits and self.place is None and other.place is None):
            return None
        shift = other.position - self.position
        others = (taker._replace(offset=taker.offset + shift) for taker in other.takers)
        return Piece(self.position, end - self.position, takers=(*self.takers, *others))


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """An index of slices without steps, such as shardings have, as starts and stops.

    Raises:
        ValueError: another number of axes, a step, or ends outside the shape.
    """
    if len(index) == len(shape) and all(isinstance(part, slice) and part.step in (None, 1) for part in index):
        ends = [
            (part.start or 0, size if part.stop is None else part.stop) for part, size in zip(index, shape, strict=True)
        ]
        if all(0 <= start <= stop <= size for (start, stop), size in zip(ends, shape, strict=True)):
            return tuple(ends)
    raise ValueError(f"index is {index}, expected a slice without a step for each axis of {shape}, inside of it")


def sizes_of(box: Box) -> tuple[int, ...]:
    """Shape of what is in a box."""
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """How many values are in a box."""
    return math.prod(sizes_of(box))


def check_region(part: Region, name: str, stored: tuple[int, ...], dtype: np.dtype) -> None:
    """Raises ValueError for a region that is no part of the tensor ``name``, or whose destination does not fit it."""
    box_of(tuple(slice(*ends) for ends in part.box), part.shape)
    found = math.prod(part.shape), part.out.dtype, part.out.shape
    if found != (math.prod(stored), dtype, sizes_of(part.box)) or not part.out.flags.writeable:
        is_odd = not part.out.flags.writeable
        raise ValueError(
            f"region {part.box} of {name!r} as {part.shape} goes to {'read-only ' * is_odd}{part.out.dtype}"
            f" {part.out.shape}, expected {dtype} {sizes_of(part.box)} of a tensor of shape {stored}"
        )


def pieces_of(parts: Collection[Region], gap_bytes: int) -> Iterator[Piece]:
    """The byte ranges of regions of one tensor, first to last, of at most ``STAGING_BYTES`` each.

    Args:
        parts: empty ones have no pieces.
        gap_bytes: read through so many bytes that are not wanted sooner than once more.
    """
    if len(parts) == 1:
        return _pieces_of(next(iter(parts)), gap_bytes)
    return _merged(parts, max(gap_bytes, DENSE_GAP_BYTES) if _is_dense(parts) else gap_bytes)


def _merged(parts: Collection[Region], gap_bytes: int) -> Iterator[Piece]:
    """The pieces of several regions, those that share bytes as one."""
    held = None
    for piece in heapq.merge(*(_pieces_of(part, gap_bytes) for part in parts), key=attrgetter("position")):
        joined = None if held is None else held.joined(piece)
        if held is not None and joined is None:
            yield held
        held = joined or piece
    if held is not None:
        yield held


def _is_dense(parts: Collection[Region]) -> bool:
    """Whether regions together are more than half of the rows that they lie in: columns for devices of one process."""
    shapes = {part.shape for part in parts}
    if len(shapes) != 1 or () in shapes:
        return False
    (shape,) = shapes
    rows = max(part.box[0][1] for part in parts) - min(part.box[0][0] for part in parts)
    return 2 * sum(part.out.size for part in parts) > rows * math.prod(shape[1:])


def _pieces_of(part: Region, gap_bytes: int) -> Iterator[Piece]:
    if not part.out.size:
        return
    if part.out.shape == part.shape and part.out.flags.c_contiguous:  # all of the tensor
        yield from _direct(0, part.out.reshape(-1).view(np.uint8))
        return
    shape, box, out = part.shape or (1,), part.box or ((0, 1),), part.out.reshape(part.out.shape or (1,))
    sizes, strides = sizes_of(box), tuple(math.prod(shape[axis + 1 :]) * out.itemsize for axis in range(len(shape)))
    # the innermost axis along which too much lies between two rows: below it everything is read
    apart = [axis for axis, size in enumerate(sizes) if (shape[axis] - size) * strides[axis] > gap_bytes]
    axis = apart[-1] if apart else 0
    is_direct = sizes[axis + 1 :] == shape[axis + 1 :] and out[(0,) * axis].flags.c_contiguous
    while not is_direct and strides[axis] > memory.STAGING_BYTES and axis + 1 < len(shape):
        axis += 1
    start, stop = box[axis]
    for outer in itertools.product(*(range(*ends) for ends in box[:axis])):
        base = sum(map(int.__mul__, outer, strides))
        place = out[tuple(index - ends[0] for index, ends in zip(outer, box, strict=False))]
        if is_direct:
            yield from _direct(base + start * strides[axis], place.reshape(-1).view(np.uint8))
            continue
        first = sum(ends[0] * stride for ends, stride in zip(box[axis + 1 :], strides[axis + 1 :], strict=True))
        last = sum((ends[1] - 1) * stride for ends, stride in zip(box[axis + 1 :], strides[axis + 1 :], strict=True))
        rows = max(1, memory.STAGING_BYTES // strides[axis])
        row = start
        while row < stop:
            until = min(stop, (row // rows + 1) * rows)  # of all regions at the same rows, so that they can be joined
            num_bytes = (until - 1 - row) * strides[axis] + last - first + out.itemsize
            taker = Taker(place[row - start : until - start], 0, strides[axis:])
            yield Piece(base + row * strides[axis] + first, num_bytes, takers=(taker,))
            row = until


def _direct(position: int, place: np.ndarray) -> Iterator[Piece]:
    """Bytes that go as they are to ``place``."""
    most = memory.STAGING_BYTES
    if place.size <= most:
        yield Piece(position, place.size, place)
        return
    for start in range(0, place.size, most):
        cut = place[start : start + most]
        yield Piece(position + start, cut.size, cut)
