"""Where a checkpoint's bytes come from."""

from __future__ import annotations

import os

from loaders.sources.gs import GsPrefix
from loaders.sources.library import LOCAL
from loaders.sources.local import DIRECT, LocalDirectory, is_plain
from loaders.sources.s3 import S3Prefix
from loaders.sources.source import Identity, OpenFile, PieceError, Session, Source, Unreachable, small_file

__all__ = [
    "GsPrefix",
    "Identity",
    "LocalDirectory",
    "OpenFile",
    "PieceError",
    "S3Prefix",
    "Session",
    "Source",
    "Unreachable",
    "is_plain",
    "open_source",
    "small_file",
]

STORES: dict[str, type[S3Prefix] | type[GsPrefix]] = {"s3": S3Prefix, "gs": GsPrefix}  # by scheme
READERS = (LOCAL, DIRECT)  # of local files


def open_source(uri: str | os.PathLike[str]) -> Source:
    """The source for ``uri``.

    - a path: a directory on a local file system, read file by file;
    - ``direct://path``: the same, past the page cache, where it is read once or has no room in memory;
    - ``runai://path``: the same, read by runai-model-streamer, many files at once (``runai:///absolute/path``);
    - ``s3://bucket/prefix``: objects of an S3 server, read by it too;
    - ``gs://bucket/prefix``: likewise, of Google Cloud Storage.

    Raises:
        OSError: the directory does not exist, the scheme has no source, or what it needs is not installed.
    """
    try:
        address = os.fsdecode(uri)
    except TypeError as error:
        raise OSError(f"it is a {type(uri).__name__}, expected a path or an address") from error
    scheme, separator, rest = address.partition("://")
    if not separator:
        lost, _, rest = scheme.partition(":/")
        if lost in (*STORES, *READERS):
            address = f"'{lost}:///{rest}' or '{lost}://{rest}'" if lost in READERS else f"'{lost}://{rest}'"
            raise OSError(f"a path has one slash where an address has two. Give it as text: {address}")
        return LocalDirectory(address)
    if scheme in READERS:
        return LocalDirectory(rest, scheme)
    if scheme in STORES:
        try:
            rest.encode()
        except UnicodeEncodeError as error:
            raise OSError("it is no UTF-8, which names in a store are") from error
        return STORES[scheme](rest)
    raise OSError(f"no source reads {scheme}:// . Copy the checkpoint to a local directory and pass that.")
