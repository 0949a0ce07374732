"""Linear layers and embeddings, with weights as the checkpoint has them: ``[out, in]``, in their own dtype."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

_FEW_ROWS = 256
_FEW_OF_INTEL = 6  # rows, of which MKL itself is no slower there
_PARTS = 64  # of a matrix, for threads to share out

Join = Callable[[torch.Tensor], torch.Tensor]  # of what the ranks of a mesh have


def empty_param(*shape: int) -> nn.Parameter:
    """A parameter without storage: what it will hold, and in which dtype, the checkpoint says."""
    return nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta"), requires_grad=False)


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + b in the dtype of x; W is ``[out, in]`` and cast to it.

    On a CPU in float32 MKL does badly with few rows, and is asked otherwise. One row it multiplies in one thread, but
    on Intel's CPUs: elsewhere W is given as a batch of parts, which threads share out (2 of an EPYC: 1.4 times as fast
    as ``F.linear``; of a Xeon 0.95). For more rows it is (W xᵀ)ᵀ that is computed: W is then read at the speed of
    memory, up to twice that of ``F.linear`` (2 to 128 rows; at 512 they are equal; on a Xeon 0.5 of it at 2 rows, 1.0
    at 6, 1.3 at 8 to 32). In bfloat16 neither is faster.
    """
    weight = weight.to(x.dtype)
    if not x.is_cpu or x.dtype is not torch.float32:
        return F.linear(x, weight, bias)
    size_out, size_in = weight.shape
    rows = x.numel() // size_in
    is_intel = _is_intel()
    if rows == 1 and torch.get_num_threads() > 1 and not is_intel:
        parts = math.gcd(size_out, _PARTS)
        y = torch.bmm(x.reshape(1, 1, size_in).expand(parts, 1, size_in), weight.view(parts, -1, size_in).mT)
        y = y.view(*x.shape[:-1], size_out)
    elif (_FEW_OF_INTEL if is_intel else 1) < rows <= _FEW_ROWS:
        y = torch.mm(weight, x.reshape(rows, size_in).T).T.reshape(*x.shape[:-1], size_out).contiguous()
    else:
        return F.linear(x, weight, bias)
    return y if bias is None else y + bias


@functools.cache
def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # it is no Linux
        return False


def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x Wᵀ for a stored ``[out, in]`` weight, as float32. W is cast to the dtype of x.

    torch's CPU product has no wider output, so the sums (float32) are rounded to the dtype of x on the way.
    """
    return multiply(x, weight).float()


class Linear(nn.Module):
    """y = x Wᵀ + b, returned in the dtype of x.

    The weight may be stored in another float dtype than x's; it is cast where it is used, never at rest, so that export
    gives back the checkpoint's bytes.
    """

    k_scale: torch.Tensor  # of a key projection, where keys are kept in FP8
    v_scale: torch.Tensor
    summed: Join | None = None  # on a mesh, where inputs are cut
    gathered: Join | None = None  # of a head, where outputs are

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = empty_param(out_features, in_features)
        if bias:
            self.bias = empty_param(out_features)
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias.to(x.dtype) if self.has_bias else None
        if self.summed is None:
            return multiply(x, self.weight, bias)
        y = self.summed(multiply(x, self.weight))
        return y if bias is None else y + bias

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ, float32: what a head is asked for."""
        y = project(x, self.weight)
        return y if self.gathered is None else self.gathered(y)


class Embedding(nn.Module):
    """Rows of a ``[V, D]`` table."""

    summed: Join | None = None  # on a mesh, where rows are cut
    gathered: Join | None = None
    held: range | None = None  # the rows that are here; None: all

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.weight = empty_param(num_embeddings, embedding_dim)
        self.num_embeddings = self.org_vocab_size = num_embeddings
        self.embedding_dim = embedding_dim

    def forward(self, ids_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.held is None or self.summed is None:
            return F.embedding(ids_BT, self.weight).to(dtype)
        place_BT = ids_BT - self.held.start
        is_here_BT1 = ((place_BT >= 0) & (place_BT < len(self.held)))[..., None]
        x_BTD = F.embedding(place_BT.clamp(0, len(self.held) - 1), self.weight).to(dtype)
        return self.summed(torch.where(is_here_BT1, x_BTD, 0))  # one rank has each row

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ, float32: what a head is asked for."""
        y = project(x, self.weight)
        return y if self.gathered is None else self.gathered(y)
