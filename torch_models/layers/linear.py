"""Linear layers and embeddings, with weights as the checkpoint has them: ``[out, in]``, in their own dtype."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def empty_param(*shape: int) -> nn.Parameter:
    """A parameter without storage: what it will hold, and in which dtype, the checkpoint says."""
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x Wᵀ for a stored ``[out, in]`` weight, as float32. W is cast to the dtype of x.

    torch's CPU product has no wider output, so the sums (float32) are rounded to the dtype of x on the way.
    """
    return F.linear(x, weight.to(x.dtype)).float()


class Linear(nn.Module):
    """y = x Wᵀ + b, returned in the dtype of x.

    The weight may be stored in another float dtype than x's; it is cast where it is used, never at rest, so that export
    gives back the checkpoint's bytes.
    """

    k_scale: torch.Tensor  # of a key projection, where keys are kept in FP8
    v_scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = empty_param(out_features, in_features)
        if bias:
            self.bias = empty_param(out_features)
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype) if self.has_bias else None)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ, float32: what a head is asked for."""
        return project(x, self.weight)


class Embedding(nn.Module):
    """Rows of a ``[V, D]`` table."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.weight = empty_param(num_embeddings, embedding_dim)
        self.num_embeddings = self.org_vocab_size = num_embeddings
        self.embedding_dim = embedding_dim

    def forward(self, ids_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return F.embedding(ids_BT, self.weight).to(dtype)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ, float32: what a head is asked for."""
        return project(x, self.weight)
