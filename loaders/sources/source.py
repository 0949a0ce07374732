"""What a place that checkpoints lie in offers: files by name, read at a position, and perhaps many at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType
from typing import Protocol, TypeVar

import numpy as np

from loaders.reading.regions import Piece

MAX_JSON_BYTES = 64 << 20  # an index of 400 000 tensors

Result = TypeVar("Result")


class Identity(Protocol):
    """What must not change between opening a checkpoint and reading it: compared with ``==``."""

    @property
    def num_bytes(self) -> int: ...


class OpenFile(Protocol):
    """One file: read at a position, straight into the caller's memory. Everything may raise OSError."""

    @property
    def name(self) -> str: ...
    @property
    def address(self) -> str:
        """What a ``Session`` of the same source reads it by."""
        ...

    @property
    def opened(self) -> Identity:
        """As the file was when it was opened, or before, where that was known."""
        ...

    def identity(self) -> Identity:
        """As the file is now."""
        ...

    def read_into(self, out: memoryview, position: int) -> None:
        """Fill ``out`` (flat bytes) from byte ``position`` on. Raises OSError when the file ends before."""
        ...

    def read(self, position: int, count: int) -> bytes: ...
    def close(self) -> None: ...
    def __enter__(self) -> OpenFile: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


class Unreachable(OSError):
    """A server that does not answer, or not in time: asking it for another file would only take as long again."""


class PieceError(OSError):
    """A piece that could not be read; ``ticket`` says which, None: nothing came any more."""

    def __init__(self, what: str, ticket: int | None = None) -> None:
        super().__init__(what)
        self.ticket = ticket


class Session(Protocol):
    """Reads many stretches of files at once: straight into place, or into memory of its own, lent for one step."""

    @property
    def stretch_bytes(self) -> int:
        """The most that is to be asked for at once, in pieces of ``STAGING_BYTES`` at most."""
        ...

    @property
    def num_stretches(self) -> int:
        """So many on their way keep it busy."""
        ...

    def submit(self, file: OpenFile, position: int, pieces: Sequence[Piece]) -> int:
        """Ask for the stretch of ``file``, which has to stay open, that ``pieces`` are, one after the other.

        Does not wait. Returns the ticket it comes with. A piece may be empty, or of bytes that nobody wants.
        """
        ...

    def next(self) -> tuple[int, np.ndarray | None]:
        """The next stretch to arrive, in whatever order: its ticket and its bytes (uint8), or None: they are in place.

        The array is borrowed: the next call, or ``close``, may overwrite it.

        Raises:
            PieceError: it cannot be read, or nothing arrives within the session's deadline.
        """
        ...

    def close(self) -> None:
        """Read no more. What is on its way has ended, or never arrives in memory that is used again."""
        ...


class Source(Protocol):
    """The files of one checkpoint, by plain name. ``str`` of it is the address it was opened by."""

    @property
    def absolute(self) -> str:
        """The address it is found by from any directory."""
        ...

    def __fspath__(self) -> str:
        """The same: whatever takes an address takes a source."""
        ...

    @property
    def gap_bytes(self) -> int:
        """So many bytes between two stretches are read sooner than a second stretch is asked for."""
        ...

    @property
    def is_dear_to_ask(self) -> bool:
        """Whether an identity takes a request: it is asked for twice a reading then, of all files at once."""
        ...

    def names(self) -> list[str]: ...
    def open(self, name: str, known: Identity | None = None) -> OpenFile:
        """Open a file. Raises OSError.

        Args:
            name: of the file.
            known: what it was before. Where it is dear to ask that is not done again, and the file reads no other; a
                ``Session`` does, so who has one asks before and after.
        """
        ...

    def identity(self, name: str) -> Identity:
        """Of a file as it is now. Raises OSError as ``open``."""
        ...

    def in_parallel(self, work: Callable[[str], Result], names: Collection[str]) -> Iterator[Result]:
        """``work`` of each name, in their order; where it is dear to ask, done for several at once.

        Args:
            work: from any thread; of a name for which it raised Unreachable perhaps once more, alone.
            names: of what.
        Raises:
            Exception: what ``work`` raises, of whichever name does so first.
        """
        ...

    def read_file(self, name: str) -> bytes:
        """A whole small file. Raises OSError as ``open``, and when it is larger than any JSON of a checkpoint."""
        ...

    def session(self, total_bytes: int) -> Session:
        """What reads many stretches at once, of a checkpoint whose files have ``total_bytes``."""
        ...

    def is_current(self, session: Session) -> bool:
        """Whether another one would be no better: credentials may have been renewed since this was made.

        Raises:
            OSError: they cannot be.
        """
        ...


def small_file(file: OpenFile, num_bytes: int) -> bytes:
    """All of a file of so many bytes. Raises OSError when it is larger than any JSON of a checkpoint."""
    if num_bytes > MAX_JSON_BYTES:
        raise OSError(f"it has {num_bytes} bytes, expected at most {MAX_JSON_BYTES}")
    return file.read(0, num_bytes)
