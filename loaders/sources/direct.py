"""Local files read past the page cache (O_DIRECT), for what has no room there or is read once.

What lies in the cache is copied from it; the rest goes from the disk to a thread's own buffer and from there to its
place, for less CPU time. Nothing stays behind, so the next load is as cold. It is only a way to the same
bytes: what cannot be read so, for whatever reason, is read the other way, which also says what is wrong.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import numpy as np

from loaders.reading import memory
from loaders.reading.memory import aligned_empty
from loaders.reading.regions import Piece
from loaders.sources.positioned import LocalFile, PositionedSession
from loaders.sources.source import OpenFile

BLOCK_BYTES = 4096  # of which address, position and size have to be multiples, on every disk that is met today
LEAST_BYTES = 1 << 20  # a smaller stretch waits longer for the disk than for the cache
SAMPLE_BYTES = 2 << 20  # of a stretch, one page is looked for in the cache
THREADS = 4  # they wait for the disk, not for a core


class DirectSession(PositionedSession):
    """Reads of local files; see ``loaders.sources.source.Session``. Nothing is lent."""

    def __init__(self) -> None:
        super().__init__(THREADS)

    @property
    def stretch_bytes(self) -> int:
        return memory.STAGING_BYTES  # all of it goes through a thread's buffer

    def submit(self, file: OpenFile, position: int, pieces: Sequence[Piece]) -> int:
        assert isinstance(file, LocalFile), f"{file.name} is another source's"
        _ = file.uncached  # opened before threads would, each for itself
        return super().submit(file, position, pieces)

    def _read(self, file: LocalFile, position: int, pieces: Sequence[Piece]) -> None:
        num_bytes = sum(piece.num_bytes for piece in pieces)
        if file.uncached is None or num_bytes < LEAST_BYTES or _is_cached(file, position, num_bytes):
            return super()._read(file, position, pieces)
        skipped = position % BLOCK_BYTES
        wanted = skipped + num_bytes
        raw = self._blocks(-(-wanted // BLOCK_BYTES))
        try:
            count = os.preadv(file.uncached, [raw.data], position - skipped)
        except OSError:
            count = 0
        if count < wanted:
            return super()._read(file, position, pieces)
        os.posix_fadvise(file.descriptor, position - skipped, wanted, os.POSIX_FADV_DONTNEED)  # asking brought pages in
        start = skipped
        for piece in pieces:
            piece.take(raw[start : start + piece.num_bytes])
            start += piece.num_bytes
        return None

    def _staging(self, num_bytes: int) -> np.ndarray:
        return self._blocks(-(-num_bytes // BLOCK_BYTES))[:num_bytes]  # a thread has one buffer, whichever way it reads

    def _blocks(self, count: int) -> np.ndarray:
        """So many blocks of this thread's own, the first at a multiple of their size."""
        held: np.ndarray | None = getattr(self._local, "blocks", None)
        if held is None or held.size < count * BLOCK_BYTES:
            room = aligned_empty(((count + 1) * BLOCK_BYTES,), np.dtype(np.uint8))
            held = self._local.blocks = room[-room.ctypes.data % BLOCK_BYTES :]
        return held[: count * BLOCK_BYTES]


def _is_cached(file: LocalFile, position: int, num_bytes: int) -> bool:
    """Whether pages all over a stretch are in the cache; none that is not is waited for."""
    byte = bytearray(1)
    samples = [*range(position, position + num_bytes, SAMPLE_BYTES), position + num_bytes - 1]
    with contextlib.suppress(AttributeError, OSError):  # BlockingIOError: it is not there
        return all(os.preadv(file.descriptor, [byte], place, os.RWF_NOWAIT) for place in samples)
    return False
