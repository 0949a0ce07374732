"""The dense gated MLP."""

from __future__ import annotations

import jax
from flax import nnx

from jax_models.layers.linear import Linear


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)). Source: transformers ``Qwen3MLP``."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
