"""What holds of a checkpoint in any object store."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loaders import CheckpointError, open_checkpoint
from loaders.digest import digests


def assert_same_checkpoint(uri: str, directory: Path) -> None:
    """The same config, tensors and bytes, and ``uri`` is what it is called."""
    found, local = open_checkpoint(uri), open_checkpoint(directory)
    assert (found.config, found.tensors, str(found.source)) == (local.config, local.tensors, uri)
    assert digests(found.stream()) == digests(local.stream())
    name = next(iter(local.tensors))
    assert found.read(name).tobytes() == local.read(name).tobytes()


def ends_within(seconds: float, attempt: Callable[[], object]) -> str:
    """What it raises, which it does in time."""
    started = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        attempt()
    assert time.monotonic() - started < seconds
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]
