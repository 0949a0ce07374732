"""Who is told of every comparison. Apart from what makes them, since a test runner that watches must import nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Watcher = Callable[[Any], str | None]  # takes a parity.asserting.Held; may return the command that finds the same again
_WATCHER: ContextVar[Watcher | None] = ContextVar("parity_watcher", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Have ``watcher`` told of every comparison made inside the block, in this thread."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def tell(held: Any) -> str | None:
    """Tell whoever watches; what they say reproduces it, None where nobody does."""
    watcher = _WATCHER.get()
    return watcher(held) if watcher else None
