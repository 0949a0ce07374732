"""Local files read at a position, by a few threads, straight into the caller's memory.

Never by mmap: a mapped file that is truncated kills the process (SIGBUS); one rewritten in place changes weights that
were loaded long ago. A file's identity is pinned when the checkpoint is opened and checked again around every read.
"""

from __future__ import annotations

import itertools
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType

import numpy as np

from loaders.errors import reason
from loaders.reading import memory
from loaders.reading.memory import aligned_empty, thread_count
from loaders.reading.regions import Piece
from loaders.sources.source import OpenFile, PieceError
from loaders.sources.writers import has_writer

PIECES_ON_THEIR_WAY = 16
WRITING_S = 60.0  # so long a call of write(2) may take; a file's times are set as it begins
_CHUNK_BYTES = 64 << 20  # one preadv; bounded so that a huge tensor stays interruptible


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What must not change between opening a checkpoint and reading it.

    Attributes:
        changed_ns: when the file or its attributes changed: unlike ``modified_ns`` nobody can set it back. Whether it
            was also written to nobody can tell then, so it counts as that, also where the file only lost its name.
    """

    device: int
    inode: int
    num_bytes: int
    modified_ns: int
    changed_ns: int = field(repr=False)


class LocalFile:
    """One open file: read at a position, straight into the caller's memory."""

    def __init__(self, path: Path) -> None:
        # O_NONBLOCK: opening a FIFO somebody named *.safetensors must fail, not hang
        self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self.name = path.name
        mode = os.fstat(self.descriptor).st_mode
        if not stat.S_ISREG(mode):
            self.close()
            raise (IsADirectoryError if stat.S_ISDIR(mode) else OSError)("it is not a regular file")
        self.opened = self.identity()
        ago_s = (time.time_ns() - self.opened.changed_ns) / 1e9
        if ago_s < WRITING_S and has_writer(self.descriptor):
            self.close()
            raise OSError(
                f"it changed {max(ago_s, 0.0):.1f} s ago, and a program still has it open for writing. Open it again"
                " when that has closed it."
            )

    @property
    def address(self) -> str:
        return f"/proc/self/fd/{self.descriptor}"  # the file that was opened, whatever has its name by now

    @cached_property
    def uncached(self) -> int | None:
        """Descriptor that reads past the page cache (O_DIRECT); None: there is no such way here, or where it lies."""
        try:
            return os.open(self.address, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except (AttributeError, OSError):
            return None

    def close(self) -> None:
        os.close(self.descriptor)
        if (uncached := self.__dict__.pop("uncached", None)) is not None:
            os.close(uncached)

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def identity(self) -> FileIdentity:
        found = os.fstat(self.descriptor)
        return FileIdentity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def read_into(self, out: memoryview, position: int) -> None:
        """Fill ``out`` (flat bytes) from byte ``position`` on. Raises OSError when the file ends before."""
        for start in range(0, len(out), _CHUNK_BYTES):
            self.scatter_into([out[start : start + _CHUNK_BYTES]], position + start)

    def scatter_into(self, outs: Sequence[memoryview], position: int) -> None:
        """Fill ``outs`` one after the other, likewise."""
        waiting = deque(outs)
        end = position + sum(len(out) for out in outs)
        while position < end:
            count = os.preadv(self.descriptor, waiting, position)
            if count == 0:
                raise OSError(f"it ends at byte {position}, expected {end}: truncated")
            position += count
            while waiting and count >= len(waiting[0]):
                count -= len(waiting.popleft())
            if count:
                waiting[0] = waiting[0][count:]

    def read(self, position: int, count: int) -> bytes:
        out = bytearray(count)
        self.read_into(memoryview(out), position)
        return bytes(out)


class PositionedSession:
    """Reads of local files; see ``loaders.sources.source.Session``. Nothing is lent.

    Args:
        num_threads: that read; None: as many as memory is the limit for.

    Stretches are done in the order in which they were asked for, so tensors come in file order. A thread holds no lock
    of Python's while it reads. The first stretch waits for company: where none comes, as when one tensor is read, it is
    read by the caller; starting threads took most of such a read (measured, a small tensor: 0.5 ms, without 0.15).
    """

    def __init__(self, num_threads: int | None = None) -> None:
        self._num_threads = num_threads or thread_count()
        self._readers: ThreadPoolExecutor | None = None
        self._tickets = itertools.count()
        self._flying: deque[tuple[int, Callable[[], None]]] = deque()
        self._local = threading.local()  # staging of a thread

    @property
    def stretch_bytes(self) -> int:
        """Of few threads more than is lent at once: what goes straight into place takes no memory of ours, and between
        two a thread waits for Python (measured with two threads: 2.8 GB into fresh memory at 1.09 the speed of 8 MiB).
        Many have something to do only if stretches are small (measured with eight: 1.4 the speed of 32 MiB).
        """
        return max(1, PIECES_ON_THEIR_WAY // self.num_stretches) * memory.STAGING_BYTES

    @property
    def num_stretches(self) -> int:
        return 2 * self._num_threads  # none waits for the caller, who is at what came before

    def submit(self, file: OpenFile, position: int, pieces: Sequence[Piece]) -> int:
        assert isinstance(file, LocalFile), f"{file.name} is another source's"
        ticket = next(self._tickets)
        read = partial(self._read, file, position, pieces)
        if ticket:
            if self._readers is None:
                self._readers = ThreadPoolExecutor(self._num_threads, thread_name_prefix="tandem-read")
                self._flying = deque((early, self._readers.submit(waits).result) for early, waits in self._flying)
            read = self._readers.submit(read).result
        self._flying.append((ticket, read))
        return ticket

    def next(self) -> tuple[int, None]:
        assert self._flying, "nothing was submitted"
        ticket, wait_or_read = self._flying.popleft()
        try:
            wait_or_read()
        except OSError as error:
            raise PieceError(reason(error), ticket) from error
        return ticket, None

    def close(self) -> None:
        self._flying.clear()
        if self._readers is not None:
            self._readers.shutdown(wait=True, cancel_futures=True)  # each thread ends the piece it is at

    def _read(self, file: LocalFile, position: int, pieces: Sequence[Piece]) -> None:
        staged = [piece for piece in pieces if piece.place is None]
        raw = self._staging(sum(piece.num_bytes for piece in staged)) if staged else None
        buffers: list[memoryview] = []
        used = 0
        for piece in pieces:
            if piece.place is not None:
                buffers.append(piece.place.data)
            elif raw is not None:
                buffers.append(raw[used : used + piece.num_bytes].data)
                used += piece.num_bytes
        file.scatter_into(buffers, position)
        for piece, buffer in zip(pieces, buffers, strict=True):
            if piece.place is None:
                piece.take(np.frombuffer(buffer, np.uint8))

    def _staging(self, num_bytes: int) -> np.ndarray:
        held: np.ndarray | None = getattr(self._local, "staging", None)
        if held is None or held.size < num_bytes:
            held = self._local.staging = aligned_empty((num_bytes,), np.dtype(np.uint8))
        return held
