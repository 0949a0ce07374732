"""Which code may synchronise with the host: none of what runs inside a captured graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

STEP_TOKENS = 8  # runs of so many tokens a row are steps of decoding, one token or a draft's few, not prompts
_IS_CAPTURED: ContextVar[bool] = ContextVar("is_captured", default=False)


@contextmanager
def capturing() -> Iterator[None]:
    """Around a capture, and what runs before it to warm up."""
    token = _IS_CAPTURED.set(True)
    try:
        yield
    finally:
        _IS_CAPTURED.reset(token)


def asks_host(x_BTD: torch.Tensor) -> bool:
    """Whether a run may wait to be told on the host which experts were chosen.

    No step of decoding on a device may, captured or not: it would wait. A CPU waits for nobody, and copies a weight no
    sooner than it multiplies by it.
    """
    return x_BTD.shape[1] > STEP_TOKENS or (x_BTD.device.type == "cpu" and not _IS_CAPTURED.get())
