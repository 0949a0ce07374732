"""The dense gated MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from torch_models.layers.linear import Linear
from torch_models.taps import tap


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

    path: str = ""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, activation: Callable[[torch.Tensor], torch.Tensor] = F.silu
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)
        self.activation = activation

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        gate_BTF = tap(self.path, "gate_proj", self.gate_proj(x_BTD))
        up_BTF = tap(self.path, "up_proj", self.up_proj(x_BTD))
        product_BTF = tap(self.path, "product", self.activation(gate_BTF) * up_BTF)
        return tap(self.path, "down_proj", self.down_proj(product_BTF))
