"""A checkpoint directory on a local file system, read by position.

Never by mmap: a mapped file that is truncated kills the process (SIGBUS); one rewritten in place changes weights that
were loaded long ago. A file's identity is pinned when the checkpoint is opened and checked again around every read.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from loaders.sources.runai import RunaiSession, find_library
from loaders.sources.source import small_file

_CHUNK_BYTES = 64 << 20  # one preadv; bounded so that a huge tensor stays interruptible


def is_plain(name: str) -> bool:
    """Whether ``name`` names a file of the directory itself: no path, nothing that cannot be printed."""
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name and name.isprintable()


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What must not change between opening a checkpoint and reading it."""

    device: int
    inode: int
    num_bytes: int
    modified_ns: int


class LocalFile:
    """One open file: read at a position, straight into the caller's memory."""

    def __init__(self, path: Path) -> None:
        # O_NONBLOCK: opening a FIFO somebody named *.safetensors must fail, not hang
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self.name = path.name
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            self.close()
            raise OSError("it is not a regular file")

    @property
    def address(self) -> str:
        return f"/proc/self/fd/{self._descriptor}"  # the file that was opened, whatever has its name by now

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def identity(self) -> FileIdentity:
        found = os.fstat(self._descriptor)
        return FileIdentity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def read_into(self, out: memoryview, position: int) -> None:
        """Fill ``out`` (flat bytes) from byte ``position`` on. Raises OSError when the file ends before."""
        done = 0
        while done < len(out):
            count = os.preadv(self._descriptor, [out[done : done + _CHUNK_BYTES]], position + done)
            if count == 0:
                raise OSError(f"it ends at byte {position + done}, expected {position + len(out)}: truncated")
            done += count

    def read(self, position: int, count: int) -> bytes:
        out = bytearray(count)
        self.read_into(memoryview(out), position)
        return bytes(out)


class LocalDirectory:
    """The files of one directory, by plain file name; ``is_streamed``: many at once, by runai-model-streamer."""

    gap_bytes = 4096  # a page, which comes from the disk whole

    def __init__(self, path: object, *, is_streamed: bool = False) -> None:
        self.path = Path(str(path))
        self.is_streamed = is_streamed
        if not self.path.is_dir():
            raise OSError(f"{self.path} is not a directory")
        if is_streamed:
            find_library()  # what is not installed is said before anything is read

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
        target = Path(os.path.realpath(path))  # unlike resolve(), no exception of its own kind for a loop of links
        if path.is_symlink() and not self._is_inside(target):
            raise OSError(f"it is a link to {target}, outside the checkpoint directory")
        return LocalFile(path)

    def read_file(self, name: str) -> bytes:
        with self.open(name) as file:
            return small_file(file)

    def session(self) -> RunaiSession | None:
        return RunaiSession(str(self)) if self.is_streamed else None

    def _is_inside(self, target: Path) -> bool:
        root = self.path.resolve()
        if target.is_relative_to(root):
            return True
        # the Hugging Face cache: <repo>/snapshots/<revision>/<name> links to <repo>/blobs/<hash>
        return root.parent.name == "snapshots" and target.is_relative_to(root.parent.parent / "blobs")
