"""A checkpoint directory on a local file system: which of its files may be opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from loaders.reading.memory import physical_bytes
from loaders.sources.direct import DirectSession
from loaders.sources.library import LOCAL, find_library
from loaders.sources.positioned import LocalFile, PositionedSession
from loaders.sources.runai import RunaiSession
from loaders.sources.source import Identity, Result, Session, small_file

DIRECT = "direct"  # the scheme of files that are read past the page cache


def is_plain(name: str) -> bool:
    """Whether ``name`` names a file of the directory itself: no path, nothing that cannot be printed."""
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name and name.isprintable()


class LocalDirectory:
    """The files of one directory, by plain file name; the same one wherever the process goes (``os.chdir``).

    Args:
        path: of the directory.
        scheme: how they are read: ``runai``: many at once, by runai-model-streamer; ``direct``: past the page cache;
            none: through it, unless the checkpoint is larger than the memory there is.
    Raises:
        OSError: it is not a directory, or what reads it is not installed.
    """

    gap_bytes = 4096  # a page, which comes from the disk whole
    is_dear_to_ask = False

    def __init__(self, path: str, scheme: str = "") -> None:
        self._written = Path(path)
        self.path = self._written.absolute()
        self.scheme = scheme
        if not path:
            raise OSError("it names no directory, and is not taken for the current one. Give '.' for that.")
        if not self.path.exists():
            raise OSError(
                f"{self._written} is not a directory that exists. Directories, s3:// and gs:// are read, and nothing"
                " is downloaded from the Hugging Face Hub: hf download NAME --local-dir DIR does that"
            )
        if not self.path.is_dir():
            raise OSError(f"{self._written} is not a directory but a file. Give the directory it is in")
        if scheme == LOCAL:
            find_library(LOCAL)  # what is not installed is said before anything is read

    def __str__(self) -> str:
        return self._address(self._written)

    @property
    def absolute(self) -> str:
        return self._address(self.path)

    def __fspath__(self) -> str:
        return self.absolute

    def _address(self, path: Path) -> str:
        return f"{self.scheme}://{path}" if self.scheme else str(path)

    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.path.iterdir())

    def open(self, name: str, known: Identity | None = None) -> LocalFile:
        """Open the file called ``name``; see ``Source.open``.

        Raises:
            OSError: no such file, not a regular file, or a name or link that leads out of the checkpoint.
        """
        if not is_plain(name):
            raise OSError("it is not a plain file name inside the checkpoint directory")
        path = self.path / name
        if path.is_symlink():
            target = Path(os.path.realpath(path))  # unlike resolve(), no exception of its own kind for a loop of links
            if not self._is_inside(target):
                raise OSError(f"it is a link to {target}, outside the checkpoint directory")
        return LocalFile(path)

    def identity(self, name: str) -> Identity:
        with self.open(name) as file:
            return file.opened

    def read_file(self, name: str) -> bytes:
        with self.open(name) as file:
            return small_file(file, file.opened.num_bytes)

    def in_parallel(self, work: Callable[[str], Result], names: Collection[str]) -> Iterator[Result]:
        return map(work, names)

    def session(self, total_bytes: int) -> Session:
        if self.scheme == LOCAL:
            return RunaiSession(str(self))
        return DirectSession() if self.scheme == DIRECT or total_bytes > physical_bytes() else PositionedSession()

    def is_current(self, session: Session) -> bool:
        return True

    def _is_inside(self, target: Path) -> bool:
        root = self.path.resolve()
        if target.is_relative_to(root):
            return True
        # the Hugging Face cache: <repo>/snapshots/<revision>/[<directory>/]<name> links to <repo>/blobs/<hash>
        return any(
            revision.parent.name == "snapshots" and target.is_relative_to(revision.parent.parent / "blobs")
            for revision in (root, *root.parents)
        )
