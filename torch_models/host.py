"""What callers hand over, as NumPy sees it."""

from __future__ import annotations

from typing import Any

import torch


def on_host(value: Any) -> Any:
    """A tensor of any device as NumPy, bfloat16 widened to float32, which NumPy lacks; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    host = value.detach().cpu()
    return (host.float() if host.dtype is torch.bfloat16 else host).numpy()
