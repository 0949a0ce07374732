"""Rounding to FP8 with a scale from the checkpoint, and back."""

from __future__ import annotations

from typing import Any

import torch

from loaders.quantization.schemes import KVCache

E4M3_MAX = 448.0


def fp8_rounded(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """x / scale rounded to e4m3, saturating, in the dtype of x: what an FP8 product sees, without ``scale``."""
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def fp8_kept(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """What an FP8 cache gives back of keys or values x, in the dtype of x."""
    return (fp8_rounded(x, scale).float() * scale).to(x.dtype)


def cache_scales(k_proj: Any, v_proj: Any, how: KVCache) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Of the keys and of the values in an FP8 cache: those of the projections; 1 where they are cast as they are."""
    return (k_proj.k_scale, v_proj.v_scale) if how == "scaled" else (1.0, 1.0)
