"""RMS normalisation. Dimension letters: docs/glossary.md."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """y = weight * x / rms(x), with rms taken over the last axis.

    The mean is computed in float32 and the result is cast back *before* the product with ``weight``: that order is the
    reference's, and bf16 parity depends on it. Source: transformers ``Qwen3RMSNorm``; arXiv:1910.07467, eq. 4.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        self.weight = nnx.Param(jnp.ones((size,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.eps)
        return self.weight[...].astype(x.dtype) * normed.astype(x.dtype)
