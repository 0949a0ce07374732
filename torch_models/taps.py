"""Naming intermediate values, so that a trace can be taken of the very computation that serves.

Model code calls ``tap(name, value)``, the identity. While ``collect`` is active, values
are also kept under their checkpoint module path and can be read afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_collected: ContextVar[dict[str, torch.Tensor] | None] = ContextVar("collected", default=None)


def tap(name: str, value: torch.Tensor) -> torch.Tensor:
    """Return ``value``; keep it under ``name`` while somebody collects."""
    collected = _collected.get()
    if collected is not None:
        collected[name] = value
    return value


@contextmanager
def collect() -> Iterator[dict[str, torch.Tensor]]:
    """The taps passed inside the block, by name."""
    collected: dict[str, torch.Tensor] = {}
    token = _collected.set(collected)
    try:
        yield collected
    finally:
        _collected.reset(token)
