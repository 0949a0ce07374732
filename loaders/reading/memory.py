"""Host memory that tensors are read into."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

ALIGNMENT = 64  # bytes; what JAX on CPU needs to take a NumPy buffer without copying it
LARGE_BYTES = 1 << 18
HUGE_PAGE_BYTES = 2 << 20
TILE = 128  # rows and columns turned at once
STAGING_BYTES = 8 << 20  # read at once of what cannot be read straight into place


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised C-contiguous array whose first byte lies on a multiple of ``ALIGNMENT``.

    Raises:
        MemoryError: there is none for so many bytes.
    """
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if num_bytes >= LARGE_BYTES:
        # pages of its own go back to the system when it is freed; the heap keeps what it once had, and a reload that
        # stages one parameter after the other would grow it by many
        is_huge = num_bytes >= 2 * HUGE_PAGE_BYTES
        reserved = num_bytes + (HUGE_PAGE_BYTES if is_huge else 0)  # what is not touched is no memory
        try:
            pages = np.frombuffer(mmap.mmap(-1, reserved, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"no memory for {num_bytes:,} bytes of {dtype} {shape}: read it in slices") from error
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


def thread_count() -> int:
    """How many fill memory at once: two saturate it on a small machine.

    More than eight were not tried with stretches as small as so many need.
    """
    return max(2, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def check_budget(host_budget_bytes: Any) -> None:
    """Raises ValueError unless it is a number of bytes to hold at most, or None."""
    if host_budget_bytes is None:
        return
    is_whole = isinstance(host_budget_bytes, int | np.integer) and not isinstance(host_budget_bytes, bool)
    if not is_whole or int(host_budget_bytes) < 1:
        raise ValueError(f"host_budget_bytes={host_budget_bytes!r}, expected a positive number of bytes")


@lru_cache(1)
def physical_bytes() -> int:
    """Memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def bits(array: np.ndarray) -> np.ndarray:
    """The same memory as unsigned integers, which NumPy copies faster than floats it does not know, strided or not."""
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


def fill(out: np.ndarray, found: np.ndarray) -> None:
    """Copy values of the same shape and size in bytes, whatever lies next to each other in either."""
    into, found = bits(out), bits(found)
    inner = min(range(into.ndim), key=lambda axis: (into.shape[axis] < 2, into.strides[axis], -axis), default=0)
    if into.ndim < 2 or inner == into.ndim - 1:
        into[...] = found
        return
    into, found = np.moveaxis(into, inner, -2), np.moveaxis(found, inner, -2)
    for index in np.ndindex(into.shape[:-2]):
        for row in range(0, into.shape[-2], TILE):  # in tiles that a cache holds, at twice the speed
            for column in range(0, into.shape[-1], TILE):
                tile = (*index, slice(row, row + TILE), slice(column, column + TILE))
                into[tile] = found[tile]


def as_bools(read: np.ndarray) -> None:
    """Make BOOL bytes of a file ones that NumPy knows: any but 0 and 1 is true there and undefined behaviour here."""
    np.minimum(bits(read), 1, out=bits(read))
