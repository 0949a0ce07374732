"""Where a checkpoint's bytes come from."""

from loaders.sources.local import LocalDirectory, OpenFile, is_plain

__all__ = ["LocalDirectory", "OpenFile", "is_plain", "open_source"]


def open_source(uri: object) -> LocalDirectory:
    """The source for ``uri``: a directory on a local file system.

    Raises:
        OSError: the directory does not exist, or the scheme has no source.
    """
    scheme, separator, _ = str(uri).partition("://")
    if separator:
        raise OSError(f"no source reads {scheme}:// . Copy the checkpoint to a local directory and pass that.")
    return LocalDirectory(uri)
