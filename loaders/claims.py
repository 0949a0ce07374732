"""A directory that one writer makes beside its final place: others are told, and what a killed one left is taken over.

A writer holds a lock of the directory (``flock``), which ends with its process, however that ends. Where a file system
has no locks, whoever comes last writes.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Claim:
    """Of ``temporary``, which becomes ``final``: nobody else makes either while this is held.

    Attributes:
        is_ours: what lies at ``temporary`` was made by this one, if in part, and nobody else loses by its removal.
    """

    def __init__(self, final: Path, temporary: Path) -> None:
        self.final, self.temporary = final, temporary
        self.is_ours = False
        self._held: int | None = None

    def take(self, make: Callable[[], None]) -> None:
        """Call ``make``, which makes the temporary directory in the place of what a killed writer left there.

        Raises:
            FileExistsError: the final directory is there, or another writer is at it.
        """
        self.final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.final.parent):  # so that of two who look at once one is first
            if self.final.exists():
                raise FileExistsError(
                    f"{self.final} exists meanwhile: another has written it. Nothing of it was changed."
                )
            if self.temporary.is_dir():
                os.close(_lock(self.temporary, self.final))
            self.is_ours = True
            make()
            self._held = _lock(self.temporary, self.final)

    def release(self) -> None:
        """Others may make it from here on."""
        if self._held is not None:
            held, self._held = self._held, None
            os.close(held)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Wait for it; it is held for as long as making a directory takes."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(directory: Path, final: Path) -> int:
    """A descriptor that holds the lock. Raises FileExistsError: another one does."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise FileExistsError(
            f"{final} is being written by another at this moment. Write to a directory of its own."
        ) from error
    return descriptor


def _flock(descriptor: int, how: int) -> None:
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return
