"""Bytes and copies of what a torch model holds."""

from __future__ import annotations

import numpy as np
import torch

import torch_models
from torch_models.storage import host_view


def bits(value) -> bytes:
    return host_view(value.contiguous()).tobytes() if isinstance(value, torch.Tensor) else np.asarray(value).tobytes()


def copies(model: torch_models.Model) -> list[torch.Tensor | None]:
    return [None if half is None else half.detach().clone() for half in model.get_embed_and_head()]
