"""A directory that is written all or nothing: beside its place under a lock, and renamed once it is on the disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from loaders.writing.directory_lock import Claim, remove_abandoned

NAME_LETTERS = 40  # of a directory's name in that of what is written beside it, which must not be too long


def local_path(path: str | os.PathLike[str]) -> Path:
    """Where something is to be written.

    Raises:
        ValueError: an address, which would make a directory of that name here.
    """
    if address := re.match(r"([a-z][a-z0-9+.-]+):/", os.fspath(path)):
        raise ValueError(
            f"{os.fspath(path)!r} is an address, and nothing is written to {address[1]}://. Write to a local directory"
            " and copy it."
        )
    return Path(path)


def new_directory(directory: str | os.PathLike[str]) -> Path:
    """Where a checkpoint is to be written, links resolved.

    Raises:
        FileExistsError: it is not new and not empty, or the working directory, or where a file system is mounted.
        NotADirectoryError: it is in a file.
        PermissionError: nothing may be made beside it, where it is written first.
        ValueError: it is an address.
    """
    target = Path(os.path.realpath(local_path(directory)))
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty. Write to a new directory, or remove it first.")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file, expected a directory that is new or empty.")
    if target.is_dir() and target.samefile(os.curdir):
        raise FileExistsError(f"{target} is the working directory and cannot be replaced. Name a directory in it.")
    if os.path.ismount(target):
        raise FileExistsError(f"{target} is a mount point and cannot be replaced. Name a directory in it.")
    parent = next(one for one in target.parents if one.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{parent} is a file, expected a directory to make {target} in.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{parent} may not be written by this user, and a checkpoint is written there before it gets the name"
            f" {target}. Name another directory."
        )
    return target


@contextlib.contextmanager
def filled(target: Path) -> Iterator[Path]:
    """Where to write what ``target`` is to hold. It is there under that name when the block ends, or nothing is.

    What a writer of it that was killed on this host left beside it is removed.

    Args:
        target: as ``new_directory`` has it; its parents are made.
    Raises:
        FileExistsError: somebody filled it meanwhile.
        OSError: the disk refuses something.
    """
    missing = [parent for parent in target.parents if not parent.exists()]
    remove_abandoned(_partials(target))
    # a sibling, so that the rename stays on one file system
    partial = target.parent / _partial_name(target, secrets.token_hex(4))
    claim = Claim(target, partial, over_empty=True)
    try:
        _take(claim)
        if target.exists():
            shutil.copymode(target, partial)  # of the empty directory whose place it takes
        yield partial
        _sync(partial)
        _publish(partial, target)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(target)  # a disk that is full does not say which
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise
    finally:
        claim.release()
    with contextlib.suppress(PermissionError):  # a directory that may be written and not read
        _sync(target.parent)


def _partial_name(target: Path, mark: str) -> str:
    """Of this host's, for where locks are its own (some FUSE mounts) it knows nothing of the writers of others."""
    ours = hashlib.sha256(os.fsencode(f"{platform.node()} {target.name}")).hexdigest()[:8]
    return f".{target.name[:NAME_LETTERS]}.{ours}{mark}.partial"


def _take(claim: Claim) -> None:
    """Also where somebody looks at that moment whether it is abandoned."""
    while not claim.is_held:
        try:
            claim.take()
        except FileExistsError:
            new_directory(claim.final)  # says so if it is that which is there
            time.sleep(0.001)


def _partials(target: Path) -> list[Path]:
    """What this host is writing to become ``target``, or was when its writer was killed."""
    before, after = _partial_name(target, "/").split("/")
    name = re.compile(f"{re.escape(before)}[0-9a-f]{{8}}{re.escape(after)}")
    try:
        return [path for path in target.parent.iterdir() if name.fullmatch(path.name)]
    except OSError:  # the parent is not there yet, or may not be read
        return []


def _publish(partial: Path, target: Path) -> None:
    try:
        partial.rename(target)
    except OSError:
        new_directory(target)  # somebody filled it meanwhile: say so
        raise


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
