"""Linear layers and embeddings, with weights as the checkpoint has them: ``[out, in]``, in their own dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def project(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x Wᵀ for a stored ``[out, in]`` weight, float32. W is cast to the dtype of x, products are summed in float32."""
    return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype), preferred_element_type=jnp.float32)


class Linear(nnx.Module):
    """y = x Wᵀ + b, accumulated in float32 and returned in the dtype of x.

    The weight may be stored in another float dtype than x's; it is cast where it is used, never at rest, so that export
    gives back the checkpoint's bytes.
    """

    k_scale: nnx.Param  # of a key projection, where keys are kept in FP8
    v_scale: nnx.Param

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        self.weight = nnx.Param(jnp.zeros((out_features, in_features)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((out_features,)))
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias

    def __call__(self, x: jax.Array) -> jax.Array:
        y32 = project(x, self.weight[...])
        if self.has_bias:
            y32 = y32 + self.bias[...].astype(x.dtype).astype(jnp.float32)
        return y32.astype(x.dtype)

    def project(self, x: jax.Array) -> jax.Array:
        """x Wᵀ, float32: what a head is asked for."""
        return project(x, self.weight[...])


class Embedding(nnx.Module):
    """Rows of a ``[V, D]`` table. An id outside the vocabulary gives NaN, not another token's row."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        self.weight = nnx.Param(jnp.zeros((num_embeddings, embedding_dim)))
        self.num_embeddings = self.org_vocab_size = num_embeddings
        self.embedding_dim = embedding_dim

    def __call__(self, ids_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return jnp.take(self.weight[...], ids_BT, axis=0, mode="fill", fill_value=jnp.nan).astype(dtype)

    def project(self, x: jax.Array) -> jax.Array:
        """x Wᵀ, float32: what a head is asked for."""
        return project(x, self.weight[...])
