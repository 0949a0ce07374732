"""The dense gated MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from torch_models.layers.linear import Linear


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU, in float32, rounded once."""
    return F.gelu(x)  # float32 inside


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation, in float32, rounded once."""
    return F.gelu(x, approximate="tanh")  # float32 inside


# by their names in config.json
ACTIVATIONS = {"gelu": gelu, "gelu_pytorch_tanh": gelu_tanh, "relu": F.relu, "silu": F.silu}


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)). Source: transformers ``Qwen3MLP``, ``Gemma3MLP``."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, activation: Callable[[torch.Tensor], torch.Tensor] = F.silu
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)
        self.activation = activation

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
