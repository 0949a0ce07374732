"""RMS normalisation. Dimension letters: docs/glossary.md."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

LAYER_NORM_EPS = 1e-6


def normed(x: jax.Array, eps: float) -> jax.Array:
    """x / √(mean(x²) + eps) over the last axis, all in float32."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    return x32 * jax.lax.rsqrt(mean_square + eps)


class RMSNorm(nnx.Module):
    """y = weight * x / rms(x), with rms taken over the last axis.

    The mean is computed in float32 and the result is cast back *before* the product with ``weight``: that order is the
    reference's, and bf16 parity depends on it. Source: transformers ``Qwen3RMSNorm``; arXiv:1910.07467, eq. 4.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        self.weight = nnx.Param(jnp.ones((size,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.weight[...].astype(x.dtype) * normed(x, self.eps).astype(x.dtype)


class GemmaRMSNorm(nnx.Module):
    """y = (1 + weight) * x / rms(x), all of it in float32, cast once at the end.

    1 + weight is part of every program that uses it, so it cannot be stale. Source: transformers ``Gemma3RMSNorm``,
    ``Qwen3_5RMSNorm``.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        self.weight = nnx.Param(jnp.zeros((size,)))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = 1.0 + self.weight[...].astype(jnp.float32)
        return (normed(x, self.eps) * gamma).astype(x.dtype)

    def add_norm(self, x: jax.Array, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The norm of x + residual, and that sum. The sum is rounded to the dtype of x, then normed as rounded."""
        total = x + residual
        return self(total), total


class RMSNormGated(nnx.Module):
    """y = weight * x / rms(x) * silu(gate): float32 but for the cast before the weight.

    Source: transformers ``Qwen3_5RMSNormGated``.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        self.weight = nnx.Param(jnp.ones((size,)))
        self.eps = eps

    def __call__(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        scaled = self.weight[...] * normed(x, self.eps).astype(x.dtype)
        return (scaled.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """y = weight * (x - mean) / std + bias over the last axis, in float32, cast once.

    eps is 1e-6 whatever the config says. Source: transformers ``Qwen3VLVisionBlock``.
    """

    def __init__(self, size: int) -> None:
        self.weight = nnx.Param(jnp.ones((size,)))
        self.bias = nnx.Param(jnp.zeros((size,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + LAYER_NORM_EPS)
        return (scaled * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)
