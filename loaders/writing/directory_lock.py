"""A directory that one writer fills beside its final place: others are told, and what a killed one left is taken over.

A writer holds a lock of the directory (``flock``), which ends with its process, however that ends. The directory stays
the same one until it is renamed or removed, so that whoever finds it can ask. Where a file system has no locks, of two
that want one directory the last fills it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path


class Claim:
    """Of ``temporary``, which becomes ``final``: nobody else fills it while this is held.

    ``over_empty``: the final directory may be there, if nothing is in it.
    """

    def __init__(self, final: Path, temporary: Path, *, over_empty: bool = False) -> None:
        self.final, self.temporary, self._over_empty = final, temporary, over_empty
        self._held: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether the temporary directory is this one's to fill, or to remove."""
        return self._held is not None

    def take(self) -> None:
        """Make the temporary directory, or empty what a killed writer left there, and hold it.

        Raises:
            FileExistsError: the final directory is there, or another writer is at it.
            OSError: it cannot be made.
        """
        try:
            self.final.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from error
        while self._held is None:  # whoever it was may finish, or give up, between two looks
            with contextlib.suppress(FileExistsError):
                self.temporary.mkdir()
            self._held = self._lock()
        try:
            self._empty()
            if self.final.exists() and not (self._over_empty and self.final.is_dir() and not any(self.final.iterdir())):
                self.temporary.rmdir()
                raise FileExistsError(f"{self.final} exists now: another process wrote it. It was not changed.")
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Others may fill it from here on."""
        if self._held is not None:
            held, self._held = self._held, None
            with contextlib.suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_UN)  # a child that was forked meanwhile has the descriptor, too
            os.close(held)

    def _empty(self) -> None:
        for path in list(self.temporary.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _lock(self) -> int | None:
        """A descriptor that holds the lock; None: the directory is gone, or another one. Raises FileExistsError."""
        try:
            descriptor = os.open(self.temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)  # not a link's
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise FileExistsError(
                f"{self.final} is being written by another at this moment. Write to a directory of its own."
            ) from error
        except OSError:  # a file system without locks
            pass
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.lstat(self.temporary)):
                return descriptor
        os.close(descriptor)
        return None


def remove_abandoned(directories: Iterable[Path]) -> None:
    """Remove those whose writers are gone. Where a file system has no locks nobody knows, and they stay."""
    for path in directories:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(descriptor)
