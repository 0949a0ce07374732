"""A file that is written all or nothing: beside its place, and renamed once it is whole."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write what ``path`` is to hold. It does when the block ends; else what it held is still there.

    A link is followed. What no file can take the place of gets a copy, once that is whole: a pipe or a device, a file
    that is somebody else's, has other names, or lies where nothing may be made beside it. Where this process prints it
    comes behind what has been printed.

    Raises:
        OSError: it cannot be written.
    """
    where = Path(os.path.realpath(path))
    if not _may_be_replaced(Path(path), where):
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch, "whole")
            yield copy
            with open(copy, "rb") as source, _opened(path) as sink:
                shutil.copyfileobj(source, sink)
        return
    partial = where.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        partial.touch(exist_ok=False)
        mode = (where if where.exists() else partial).stat().st_mode
        yield partial
        partial.chmod(mode)  # whoever wrote it may have made it their own
        partial.replace(where)
    except OSError as error:
        if error.errno and error.filename in (None, os.fspath(partial)):
            error.filename = os.fspath(path)  # a disk that is full does not say which
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_report(path: str | os.PathLike[str], text: str) -> None:
    """All or nothing, in UTF-8, and escaped what has none, as bytes of a path that are no text.

    Raises:
        OSError: it cannot be written.
    """
    with whole_file(path) as whole:
        whole.write_bytes(text.encode("utf-8", "backslashreplace"))


def is_stdout(path: str | os.PathLike[str]) -> bool:
    """Whether it is where this process prints, and keeps what is printed."""
    try:
        there, printed = os.stat(path), os.fstat(_stdout().fileno())
        return os.path.samestat(there, printed) and not os.path.samefile(path, os.devnull)
    except (OSError, ValueError):  # it is not there yet; or nothing is printed to a file
        return False


def _stdout() -> TextIO:
    """What Python began with, whatever is printed to meanwhile."""
    if sys.__stdout__ is None:
        raise ValueError("this process prints nowhere")
    return sys.__stdout__


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """By its name, which for a pipe is no path; where this process prints that would empty it, or write over it."""
    if not is_stdout(path):
        with open(path, "wb") as sink:
            yield sink
        return
    _stdout().flush()
    yield _stdout().buffer
    _stdout().flush()


def _may_be_replaced(path: Path, where: Path) -> bool:
    if is_stdout(path) or not os.access(where.parent, os.W_OK | os.X_OK):
        return False
    if not path.exists():
        return True
    found = path.stat()
    return path.is_file() and found.st_nlink == 1 and found.st_uid == os.geteuid()
