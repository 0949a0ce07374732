"""Host memory that tensors are read into: where it begins, what pages it has, and no more of them than it needs."""

from __future__ import annotations

import re
from itertools import permutations
from pathlib import Path

import numpy as np
import psutil
import pytest

from loaders.reading.memory import HUGE_PAGE_BYTES, LARGE_BYTES, aligned_empty, fill, prefer_huge_pages

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_huge_pages = pytest.mark.skipif(
    not THP.exists() or "[never]" in THP.read_text(), reason="this system has no transparent huge pages"
)


def huge_bytes(address: int) -> int:
    """Of the mapping at ``address``, what lies in huge pages."""
    is_it, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = (int(bound, 16) for bound in bounds.groups())
            is_it = start <= address < end
        elif is_it and line.startswith("AnonHugePages"):
            found = int(line.split()[1]) * 1024
    return found


@pytest.mark.parametrize("num_bytes", [1, 63, LARGE_BYTES, 3 * HUGE_PAGE_BYTES, 4 * HUGE_PAGE_BYTES + 12])
def test_memory_is_aligned_writeable_and_of_the_size_asked_for(num_bytes: int) -> None:
    found = aligned_empty((num_bytes,), np.dtype(np.uint8))
    found[:] = 7
    assert (found.nbytes, found.ctypes.data % 64) == (num_bytes, 0)
    assert found.flags.c_contiguous


def test_memory_that_there_is_not_is_said_to_be_how_much() -> None:
    with pytest.raises(MemoryError, match=r"no memory for 1,125,899,906,842,624 bytes of uint8 .*: read it in slices"):
        aligned_empty((1 << 50,), np.dtype(np.uint8))


@needs_huge_pages
def test_large_memory_begins_at_a_huge_page_and_lies_in_such() -> None:
    large = aligned_empty((5 * HUGE_PAGE_BYTES,), np.dtype(np.uint8))
    assert large.ctypes.data % HUGE_PAGE_BYTES == 0
    large[:] = 1
    assert huge_bytes(large.ctypes.data) >= 5 * HUGE_PAGE_BYTES  # the mapping may be one with its neighbour


@needs_huge_pages
def test_memory_of_others_is_backed_by_huge_pages_too_if_it_is_fresh() -> None:
    memory = np.empty(16 * HUGE_PAGE_BYTES, np.uint8)
    prefer_huge_pages(memory)
    memory[:] = 1
    assert huge_bytes(memory.ctypes.data + 2 * HUGE_PAGE_BYTES) >= 15 * HUGE_PAGE_BYTES


def test_huge_pages_cost_no_memory_beyond_the_array() -> None:
    """Ten arrays that end right behind a huge page's start: pages of 2 MiB for their ends would be 20 MiB."""
    process, size = psutil.Process(), 2 * HUGE_PAGE_BYTES + 4096
    before = process.memory_full_info().uss
    arrays = [aligned_empty((size,), np.dtype(np.uint8)) for _ in range(10)]
    for array in arrays:
        array[:] = 1
    grown = process.memory_full_info().uss - before
    assert 10 * size * 0.95 < grown < 10 * size + HUGE_PAGE_BYTES * 2


@pytest.mark.parametrize("axes", list(permutations(range(3))))
def test_values_are_copied_whatever_lies_next_to_each_other(axes: tuple[int, ...]) -> None:
    found = np.arange(3 * 150 * 140, dtype=np.uint16).reshape(3, 150, 140)
    out = np.zeros(tuple(found.shape[axis] for axis in axes), np.uint16).transpose(np.argsort(axes))
    fill(out, found)
    np.testing.assert_array_equal(out, found)
    fill(out[:, ::2, 1:], found[:, 75:, 1:])
    np.testing.assert_array_equal(out[:, ::2, 1:], found[:, 75:, 1:])
