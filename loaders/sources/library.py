"""The C library of runai-model-streamer: where it lies, what its functions take, and one of it for each object store.

It stays with the store it first reads from until the process ends, and sends every later request there, whatever its
address says: after ``s3://`` the bytes of ``gs://`` come from the S3 server, without a word where that has a bucket and
an object of the same name. Ending the streamer does not end that, and others in the process may have the library loaded
too. So each store is read through a copy, loaded beside the first because it is another file, and local files through
the library itself, which asks no store for them. Source: ``cpp/common/s3_wrapper`` of 0.17 (one static backend);
tests/loaders/test_stores.py.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
import threading
from contextlib import ExitStack
from functools import cache
from pathlib import Path

PACKAGE, VERSION = "runai-model-streamer", "0.17."  # the functions take other arguments in other versions
LOCAL = "runai"  # the scheme of files
EXTRAS = {LOCAL: "runai", "s3": "runai", "gs": "gs"}
PARTS = {"s3": ("runai-model-streamer-s3", "libstreamers3.so"), "gs": ("runai-model-streamer-gcs", "libstreamergcs.so")}
_loading = threading.Lock()
_loaded: set[str] = set()  # schemes, by this process
_of_parent: set[str] = set()


class Device(ctypes.Structure):
    """Where bytes are to arrive. Both zero: in the host's memory."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


def install(scheme: str) -> str:
    """What to do where something is not installed that addresses of ``scheme`` need."""
    return f"Install the extra: pip install '.[{EXTRAS[scheme]}]' in Tandem's own directory"


def find_library(scheme: str) -> Path:
    """Where the library lies, and beside it its part for ``scheme``. The package is looked for and not imported.

    Raises:
        OSError: one of them is not installed, or in a version whose functions we do not know.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise OSError(f"{PACKAGE} is not installed. {install(scheme)}")
    version = importlib.metadata.version(PACKAGE)
    if not version.startswith(VERSION):
        raise OSError(f"{PACKAGE} is {version}, expected {VERSION}*. {install(scheme)}")
    path = Path(spec.submodule_search_locations[0]) / "libstreamer" / "lib" / "libstreamer.so"
    if scheme != LOCAL:
        package, part = PARTS[scheme]
        if not path.with_name(part).is_file():
            raise OSError(f"{package} is not installed. {install(scheme)}")
    return path


def library_of(scheme: str) -> ctypes.CDLL:
    """The library that reads addresses of ``scheme`` and of no other; the same one each time.

    Raises:
        OSError: it is not installed, or no copy of it can be loaded.
    """
    path = find_library(scheme)
    if scheme == "s3" and scheme in _of_parent:  # a second copy finds the part of the first by its name
        raise OSError(
            "this process was forked from one that has read s3://, and what reads it is lost in a fork. Start it anew"
            " instead: multiprocessing.get_context('spawn')"
        )
    with _loading:
        _loaded.add(scheme)
        return _load(path, scheme)


@cache
def _load(path: Path, scheme: str) -> ctypes.CDLL:
    if scheme == LOCAL:
        return _declare(ctypes.CDLL(str(path)))
    try:
        return _declare(_load_copy(path, path.with_name(PARTS[scheme][1])))
    except OSError as error:
        raise OSError(
            f"{PACKAGE} reads from one object store in a process, so {scheme}:// is read through a copy of it, and none"
            f" can be loaded: {error}. It takes a temporary directory for links (TMPDIR) and executable memory"
        ) from error


def _load_copy(path: Path, part: Path) -> ctypes.CDLL:
    """The library once more, with static variables of its own.

    Its part for a store is looked for beside it at the first request. So it is loaded by a link from a directory of
    links, which has to stay; the copy itself is in memory, for there are systems where no temporary file is executed.
    """
    with ExitStack() as undo:
        directory = Path(tempfile.mkdtemp(prefix="tandem-streamer-"))
        undo.callback(shutil.rmtree, directory, ignore_errors=True)
        (directory / part.name).symlink_to(part)
        with open(os.memfd_create(path.name), "wb") as copy:
            copy.write(path.read_bytes())
            copy.flush()
            link = directory / path.name
            link.symlink_to(f"/proc/self/fd/{copy.fileno()}")
            library = ctypes.CDLL(str(link))
            link.unlink()
        atexit.register(_close_in, os.getpid(), undo.pop_all())
    return library


def _close_in(process: int, stays: ExitStack) -> None:
    """A process that was forked ends with its parent's duties, and must not do them."""
    if os.getpid() == process:
        stays.close()


def _after_fork() -> None:
    """Threads of a library are the parent's, so this process loads a copy of its own. One of them may hold the lock."""
    global _loading
    _loading = threading.Lock()
    _of_parent.update(_loaded)
    _load.cache_clear()


os.register_at_fork(after_in_child=_after_fork)


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, handle, text = ctypes.POINTER, ctypes.c_void_p, ctypes.c_char_p
    number, size = ctypes.c_uint32, ctypes.c_size_t
    library.runai_file_streamer_start.argtypes = [pointer(handle)]
    library.runai_file_streamer_end.argtypes = [handle]
    library.runai_file_streamer_set_credentials.argtypes = [handle, pointer(text), pointer(text), ctypes.c_uint]
    library.runai_file_streamer_request.argtypes = [
        *(handle, pointer(ctypes.c_uint64), number, pointer(text), pointer(number)),
        *(pointer(size), pointer(size), pointer(handle), Device),
    ]
    library.runai_file_streamer_response.argtypes = [
        *(handle, pointer(ctypes.c_uint64), pointer(number), pointer(number), pointer(ctypes.c_int), ctypes.c_uint)
    ]
    library.runai_file_streamer_response_str.argtypes = [ctypes.c_int]
    library.runai_file_streamer_response_str.restype = text
    return library
