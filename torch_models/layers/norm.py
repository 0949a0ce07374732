"""RMS normalisation. Dimension letters: docs/glossary.md."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from torch_models.layers.linear import empty_param

LAYER_NORM_EPS = 1e-6


def normed(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / √(mean(x²) + eps) over the last axis, all in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps)


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
        weight = self.weight.to(x.dtype)
        if x.dtype is torch.float32:  # nothing is rounded before the product
            return F.rms_norm(x, x.shape[-1:], weight, self.eps)
        return weight * normed(x, self.eps).to(x.dtype)


class GemmaRMSNorm(nn.Module):
    """y = (1 + weight) * x / rms(x), all of it in float32, cast once at the end.

    Kernels want a plain factor, so ``gemma_weight`` = 1 + weight, float32, is derived from the weight: allocated once,
    written in place, at one address for the model's life. A run derives it where it is used, so that nobody who writes
    to the weight, by whatever way, can leave it stale, a captured graph included. Source: transformers
    ``Gemma3RMSNorm``, ``Qwen3_5RMSNorm``.
    """

    gemma_weight: torch.Tensor

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = empty_param(size)
        self.register_buffer("gemma_weight", torch.empty(size, dtype=torch.float32, device="meta"), persistent=False)
        self.eps = eps

    @torch.no_grad()
    def derive(self) -> None:
        """Compute ``gemma_weight`` anew, where it is."""
        torch.add(self.weight.float(), 1.0, out=self.gemma_weight)  # float32 before the sum: 1 + w in bf16 drops bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.derive()
        # gradients go to the weight itself, and need a factor that the next run does not write over
        needs_grad = torch.is_grad_enabled() and (self.weight.requires_grad or x.requires_grad)
        factor = 1.0 + self.weight.float() if needs_grad else self.gemma_weight
        return (normed(x, self.eps) * factor).to(x.dtype)

    def add_norm(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + residual, and that sum. The sum is rounded to the dtype of x, then normed as rounded."""
        total = x + residual
        return self(total), total


class RMSNormGated(nn.Module):
    """y = weight * x / rms(x) * silu(gate): float32 but for the cast before the weight.

    Source: transformers ``Qwen3_5RMSNormGated``.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = empty_param(size)
        self.eps = eps

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return ((self.weight * normed(x, self.eps).to(x.dtype)).float() * F.silu(gate.float())).to(x.dtype)


class LayerNorm(nn.Module):
    """y = weight * (x - mean) / std + bias over the last axis, in float32, cast once.

    eps is 1e-6 whatever the config says. Source: transformers ``Qwen3VLVisionBlock``.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = empty_param(size)
        self.bias = empty_param(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), weight.shape, weight, bias, LAYER_NORM_EPS).to(x.dtype)
