"""The dense gated MLP."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from torch_models.layers.linear import Linear


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)). Source: transformers ``Qwen3MLP``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
