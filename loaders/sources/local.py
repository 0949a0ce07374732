"""A checkpoint directory on a local file system: which of its files may be opened."""

from __future__ import annotations

import os
from pathlib import Path

from loaders import memory
from loaders.sources.library import LOCAL, find_library
from loaders.sources.positioned import LocalFile, PositionedSession
from loaders.sources.runai import RunaiSession
from loaders.sources.source import Session, small_file

STRETCH_PIECES = 4


def is_plain(name: str) -> bool:
    """Whether ``name`` names a file of the directory itself: no path, nothing that cannot be printed."""
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name and name.isprintable()


class LocalDirectory:
    """The files of one directory, by plain file name; ``is_streamed``: many at once, by runai-model-streamer."""

    gap_bytes = 4096  # a page, which comes from the disk whole

    def __init__(self, path: object, *, is_streamed: bool = False) -> None:
        self.path = Path(str(path))
        self.is_streamed = is_streamed
        if not self.path.is_dir():
            raise OSError(f"{self.path} is not a directory")
        if is_streamed:
            find_library(LOCAL)  # what is not installed is said before anything is read

    @property
    def stretch_bytes(self) -> int:
        """More than is lent at once: what goes straight into place takes no memory of ours, and between two stretches
        a thread waits for Python (measured: 2.8 GB into fresh memory at 1.09 the speed of 8 MiB).
        """
        return memory.STAGING_BYTES * (1 if self.is_streamed else STRETCH_PIECES)

    def __str__(self) -> str:
        return f"runai://{self.path}" if self.is_streamed else str(self.path)

    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.path.iterdir())

    def open(self, name: str) -> LocalFile:
        """Open the file called ``name``.

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

    def read_file(self, name: str) -> bytes:
        with self.open(name) as file:
            return small_file(file)

    def session(self) -> Session:
        return RunaiSession(str(self)) if self.is_streamed else PositionedSession()

    def _is_inside(self, target: Path) -> bool:
        root = self.path.resolve()
        if target.is_relative_to(root):
            return True
        # the Hugging Face cache: <repo>/snapshots/<revision>/<name> links to <repo>/blobs/<hash>
        return root.parent.name == "snapshots" and target.is_relative_to(root.parent.parent / "blobs")
