"""What holds of a checkpoint in any object store."""

from __future__ import annotations

import time
from collections import Counter
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


class Refusal:
    """Refuses the first requests for each address in which ``where`` is; ``asked`` counts all that were made for it."""

    def __init__(self, where: str, status: int, times: int) -> None:
        self.where, self.status, self.times = where, status, times
        self.asked: Counter[str] = Counter()

    def __call__(self, path: str) -> int | None:
        if self.where not in path:
            return None
        self.asked[path] += 1
        return self.status if self.asked[path] <= self.times else None
