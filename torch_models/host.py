"""What callers hand over, as NumPy sees it, or as a tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from torch_models.storage import over_host


def on_host(value: Any) -> Any:
    """A tensor of any device as NumPy, bfloat16 widened to float32, which NumPy lacks; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    host = value.detach().cpu()
    return (host.float() if host.dtype is torch.bfloat16 else host).numpy()


def as_tensor(value: Any, name: str) -> torch.Tensor:
    """A tensor as it is; whatever NumPy understands in memory of its own, bfloat16 included.

    Raises:
        ValueError: it holds no numbers; ``name``: what it is called.
    """
    if isinstance(value, torch.Tensor):
        return value
    array = np.array(value, order="C")
    if array.dtype.name == "bfloat16":
        return over_host(array)
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise ValueError(f"{name} is {array.dtype}, expected numbers") from error
