"""Host memory that tensors are read into."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

ALIGNMENT = 64  # bytes; what JAX on CPU needs to take a NumPy buffer without copying it
LARGE_BYTES = 1 << 18
HUGE_PAGE_BYTES = 2 << 20
TILE = 128  # rows and columns turned at once
STAGING_BYTES = 8 << 20  # read at once of what cannot be read straight into place


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised C-contiguous array whose first byte lies on a multiple of ``ALIGNMENT``."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if num_bytes >= LARGE_BYTES:
        # pages of its own go back to the system when it is freed; the heap keeps what it once had, and a reload that
        # stages one parameter after the other would grow it by many
        is_huge = num_bytes >= 2 * HUGE_PAGE_BYTES
        reserved = num_bytes + (HUGE_PAGE_BYTES if is_huge else 0)  # what is not touched is no memory
        pages = np.frombuffer(mmap.mmap(-1, reserved, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        start = -pages.ctypes.data % HUGE_PAGE_BYTES if is_huge else 0
        found = pages[start : start + num_bytes]

        prefer_huge_pages(found)
        return found.view(dtype).reshape(shape)
    buffer = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + num_bytes].view(dtype).reshape(shape)


def prefer_huge_pages(array: np.ndarray) -> None:
    """Ask the system to back fresh memory by pages of 2 MiB, where writing first costs less than half as much.

    No page that would reach beyond the array is asked for, so it takes no more memory.
    """
    start = -(-array.ctypes.data // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    num_bytes = (array.ctypes.data + array.nbytes - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if num_bytes > 0 and (advise := _madvise()) is not None:
        advise(start, num_bytes, mmap.MADV_HUGEPAGE)  # a system without them says no, and nothing changes


@lru_cache(1)
def _madvise() -> Callable[[int, int, int], int] | None:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def bits(array: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers, which NumPy copies faster than floats it does not know, strided or not."""
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def is_swapped(array: np.ndarray) -> bool:
    """Whether memory without gaps lies behind ``array``, with its last two axes swapped."""
    return array.ndim > 1 and array.swapaxes(-1, -2).flags.c_contiguous


def pieces(out: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Views of at most ``STAGING_BYTES`` that together are ``out``, each with the byte of the tensor it begins at.

    A C-contiguous array is cut between bytes, one with its last two axes swapped between rows: a row at least. An empty
    one is one empty piece.
    """
    if out.flags.c_contiguous:
        flat = out.reshape(-1).view(np.uint8)
        for start in range(0, max(flat.size, 1), STAGING_BYTES):
            yield start, flat[start : start + STAGING_BYTES]
        return
    row_bytes = out.shape[-1] * out.itemsize
    rows = max(1, STAGING_BYTES // row_bytes)
    position = 0
    for index in np.ndindex(out.shape[:-2]):
        for start in range(0, out.shape[-2], rows):
            piece = out[index][start : start + rows]
            yield position, piece
            position += piece.nbytes


def fill(piece: np.ndarray, raw: np.ndarray) -> None:
    """Copy the bytes ``raw`` of a file into a piece, strided or not."""
    into, found = bits(piece), bits(raw.view(piece.dtype).reshape(piece.shape))
    if piece.flags.c_contiguous:
        into[...] = found
        return
    for row in range(0, into.shape[0], TILE):  # in tiles that a cache holds, at twice the speed
        for column in range(0, into.shape[1], TILE):
            tile = slice(row, row + TILE), slice(column, column + TILE)
            into[tile] = found[tile]


def as_bools(read: np.ndarray) -> None:
    """Make BOOL bytes of a file ones that NumPy knows: any but 0 and 1 is true there and undefined behaviour here."""
    np.minimum(bits(read), 1, out=bits(read))
