"""Regions of checkpoint tensors, read in byte ranges to where they go: what devices of a mesh hold, little else.

Rows of a tensor lie together and are one range. Columns lie apart: with more between them than another read costs they
are read row by row, with less all of it is read, some rows at a time, and what is not wanted is dropped.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loaders import dtypes
from loaders.errors import CheckpointError
from loaders.memory import STAGING_BYTES, aligned_empty, as_bools, bits

if TYPE_CHECKING:
    from loaders.checkpoint import Checkpoint
    from loaders.sources import OpenFile

Box = tuple[tuple[int, int], ...]  # start and stop along every axis
AHEAD_BYTES = 64 << 20  # of destinations asked for before they are wanted
THREADS = 2


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
        part = tuple(slice(*ends) for ends in self.box)
        bits(self.out)[...] = bits(whole.reshape(self.shape))[part]


@dataclass(frozen=True, eq=False)
class Piece:
    """Bytes that lie together in a tensor, and the values of them that are wanted.

    Attributes:
        position: of the first byte in the tensor.
        shape: of the values in those bytes.
        kept: which of them are wanted.
        out: where they go.
    """

    position: int
    shape: tuple[int, ...]
    kept: tuple[slice, ...]
    out: np.ndarray

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.out.itemsize

    @property
    def is_direct(self) -> bool:
        """Whether the bytes can be read to where they go: all are wanted, and nothing lies between them there."""
        return self.out.flags.c_contiguous and self.out.nbytes == self.num_bytes

    def take(self, raw: np.ndarray) -> None:
        """Keep what is wanted of ``num_bytes`` bytes."""
        bits(self.out)[...] = bits(raw.view(self.out.dtype).reshape(self.shape))[self.kept]


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


def pieces_of(part: Region, gap_bytes: int) -> Iterator[Piece]:
    """The byte ranges of a region, first to last; those of more than ``STAGING_BYTES`` are direct or one row.

    Args:
        part: of a tensor; an empty one has no pieces.
        gap_bytes: read through so many bytes that are not wanted rather than read twice.
    """
    if not part.out.size:
        return
    shape, box, out = part.shape or (1,), part.box or ((0, 1),), part.out.reshape(part.out.shape or (1,))
    sizes, row_bytes = sizes_of(box), [math.prod(shape[axis + 1 :]) * out.itemsize for axis in range(len(shape))]
    # the innermost axis along which too much lies between two rows: below it everything is read
    apart = [axis for axis, size in enumerate(sizes) if (shape[axis] - size) * row_bytes[axis] > gap_bytes]
    axis = apart[-1] if apart else 0
    is_direct = sizes[axis + 1 :] == shape[axis + 1 :] and _is_packed(out, axis)
    while not is_direct and row_bytes[axis] > STAGING_BYTES and axis + 1 < len(shape):
        axis += 1
    rows = sizes[axis] if is_direct else max(1, STAGING_BYTES // row_bytes[axis])
    kept = tuple(slice(*ends) for ends in box[axis + 1 :])
    for outer in itertools.product(*(range(*ends) for ends in box[:axis])):
        base = sum(index * size for index, size in zip(outer, row_bytes[:axis], strict=True))
        place = out[tuple(index - start for index, (start, _) in zip(outer, box[:axis], strict=True))]
        for row in range(0, sizes[axis], rows):
            count = min(rows, sizes[axis] - row)
            position = base + (box[axis][0] + row) * row_bytes[axis]
            yield Piece(position, (count, *shape[axis + 1 :]), (slice(None), *kept), place[row : row + count])


def shared_pieces(parts: Collection[Region]) -> Iterator[tuple[Piece, list[Piece]]]:
    """Rows that several parts have columns of, each read once for all of them; nothing where that is not worth it.

    It is where the parts together are more than half of those rows: columns for many devices of one process.
    """
    shapes = {part.shape for part in parts}
    if len(parts) < 2 or len(shapes) > 1 or not all(part.out.size for part in parts):
        return
    (shape,) = shapes
    row = math.prod(shape[1:])
    rows = max(1, STAGING_BYTES // max(1, row * next(iter(parts)).out.itemsize))
    first, last = min(part.box[0][0] for part in parts), max(part.box[0][1] for part in parts)
    if all(sizes_of(part.box)[1:] == shape[1:] for part in parts) or row * rows > 4 * STAGING_BYTES:
        return
    if 2 * sum(part.out.size for part in parts) <= (last - first) * row:
        return
    for start in range(first, last, rows):
        stop = min(start + rows, last)
        takers = []
        for part in parts:
            low, high = max(start, part.box[0][0]), min(stop, part.box[0][1])
            if low < high:
                kept = slice(low - start, high - start), *(slice(*ends) for ends in part.box[1:])
                out = part.out[low - part.box[0][0] : high - part.box[0][0]]
                takers.append(Piece(start * row * out.itemsize, (stop - start, *shape[1:]), kept, out))
        if takers:
            yield takers[0], takers


def _is_packed(array: np.ndarray, axis: int) -> bool:
    """Whether nothing lies between the values of ``array[i]``, for indices ``i`` of the axes before ``axis``."""
    return array[(0,) * axis].flags.c_contiguous


def read_regions(checkpoint: Checkpoint, file: OpenFile, name: str, parts: Collection[Region]) -> None:
    """Read parts of a tensor out of its open file, which must not have changed.

    Raises:
        CheckpointError: it has, or cannot be read.
    """
    info = checkpoint.tensors[name]
    staging = np.empty(0, np.uint8)
    pieces = list(shared_pieces(parts)) or [
        (piece, [piece]) for part in parts for piece in pieces_of(part, checkpoint.source.gap_bytes)
    ]
    try:
        for piece, takers in pieces:
            position = info.offsets[0] + piece.position
            if piece.is_direct and takers == [piece]:
                file.read_into(piece.out.reshape(-1).view(np.uint8).data, position)
                continue
            if staging.size < piece.num_bytes:
                staging = aligned_empty((piece.num_bytes,), np.dtype(np.uint8))
            raw = staging[: piece.num_bytes]
            file.read_into(raw.data, position)
            for taker in takers:
                taker.take(raw)
    except OSError as error:
        where = f"tensor {name!r} of {info.file}"
        raise CheckpointError(checkpoint.source, [f"{where} cannot be read: {error.strerror or error}"]) from error
    if info.dtype == "BOOL":
        for part in parts:
            as_bools(part.out)
    checkpoint.check_identity(file)


def check_region(checkpoint: Checkpoint, name: str, part: Region) -> None:
    """Raises ValueError for a region that is no part of the tensor, or whose destination does not fit it."""
    info = checkpoint.tensors[name]
    stored, dtype = dtypes.stored_shape(info.dtype, info.shape), dtypes.to_numpy(info.dtype)
    box_of(tuple(slice(*ends) for ends in part.box), part.shape)
    found = math.prod(part.shape), part.out.dtype, part.out.shape
    if found != (math.prod(stored), dtype, sizes_of(part.box)):
        raise ValueError(
            f"region {part.box} of {name!r} as {part.shape} goes to {part.out.dtype} {part.out.shape}, expected"
            f" {dtype} {sizes_of(part.box)} of a tensor of shape {stored}"
        )


def stream_regions(
    checkpoint: Checkpoint,
    names: Collection[str],
    wanted: Callable[[str], list[Region]],
    host_budget_bytes: int | None = None,
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """See ``Checkpoint.stream_regions``."""
    waiting = deque(name for name in checkpoint.tensors if name in names)
    ahead: deque[tuple[str, list[Region], int, Future[None] | None]] = deque()
    open_files: dict[str, OpenFile] = {}
    lent, most = 0, min(AHEAD_BYTES, AHEAD_BYTES if host_budget_bytes is None else host_budget_bytes)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="tandem-read") as readers:
        try:
            while waiting or ahead:
                while waiting and (not ahead or lent < most):
                    name = waiting.popleft()
                    parts = wanted(name)
                    for part in parts:
                        check_region(checkpoint, name, part)
                    file = checkpoint.tensors[name].file
                    if parts and file not in open_files:
                        open_files[file] = checkpoint.open_file(file)
                    size = sum(part.out.nbytes for part in parts)
                    reading = readers.submit(read_regions, checkpoint, open_files[file], name, parts) if parts else None
                    ahead.append((name, parts, size, reading))
                    lent += size
                name, parts, size, reading = ahead.popleft()
                if reading is not None:
                    reading.result()
                lent -= size
                arrays = [part.out for part in parts]
                del parts, reading  # they hold what is the caller's from here on
                yield name, arrays
                del arrays
        finally:
            for *_, reading in ahead:
                if reading is not None:
                    reading.cancel()
            readers.shutdown(wait=True)
            for file in open_files.values():
                file.close()
