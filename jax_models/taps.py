"""Naming intermediate values, so that a trace can be taken of the very computation that serves.

Model code calls ``tap(name, value)``, the identity. While ``collect`` is active (at trace time, inside one jit), values
are also kept under their checkpoint module path and can be returned as further outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_collected: ContextVar[dict[str, jax.Array] | None] = ContextVar("collected", default=None)


def tap(name: str, value: jax.Array) -> jax.Array:
    """Return ``value``; keep it under ``name`` while somebody collects."""
    collected = _collected.get()
    if collected is not None:
        collected[name] = value
    return value


@contextmanager
def collect() -> Iterator[dict[str, jax.Array]]:
    """The taps passed inside the block, by name."""
    collected: dict[str, jax.Array] = {}
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)
