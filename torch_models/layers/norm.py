"""RMS normalisation. Dimension letters: docs/glossary.md."""

from __future__ import annotations

import torch
from torch import nn

from torch_models.layers.linear import empty_param


class RMSNorm(nn.Module):
    """y = weight * x / rms(x), with rms taken over the last axis.

    The mean is computed in float32 and the result is cast back *before* the product with ``weight``: that order is the
    reference's, and bf16 parity depends on it. Source: transformers ``Qwen3RMSNorm``; arXiv:1910.07467, eq. 4.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = empty_param(size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        mean_square = x32.pow(2).mean(-1, keepdim=True)
        normed = x32 * torch.rsqrt(mean_square + self.eps)
        return self.weight.to(x.dtype) * normed.to(x.dtype)
