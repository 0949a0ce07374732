"""The dense gated MLP."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jax_models.layers.linear import Linear
from jax_models.taps import tap


def gelu(x: jax.Array) -> jax.Array:
    """GELU, in float32, rounded once."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU by its tanh approximation, in float32, rounded once."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


# by their names in config.json
ACTIVATIONS = {"gelu": gelu, "gelu_pytorch_tanh": gelu_tanh, "relu": jax.nn.relu, "silu": jax.nn.silu}


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)). Source: transformers ``Qwen3MLP``, ``Gemma3MLP``."""

    path: str = ""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, activation: Callable[[jax.Array], jax.Array] = jax.nn.silu
    ) -> None:
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)
        self.activation = activation

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = tap(self.path, "gate_proj", self.gate_proj(x_BTD))
        up_BTF = tap(self.path, "up_proj", self.up_proj(x_BTD))
        product_BTF = tap(self.path, "product", self.activation(gate_BTF) * up_BTF)
        return tap(self.path, "down_proj", self.down_proj(product_BTF))
