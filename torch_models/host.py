"""What callers hand over, as NumPy sees it."""

from __future__ import annotations

from typing import Any

import torch


def on_host(value: Any) -> Any:
    """A tensor of any device as NumPy; anything else as it is."""
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
