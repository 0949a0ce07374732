"""Linear layers and embeddings, with weights as the checkpoint has them: ``[out, in]``, in their own dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class Linear(nnx.Module):
    """y = x Wᵀ + b, accumulated in float32 and returned in the dtype of x.

    The weight may be stored in another float dtype than x's; it is cast where it is used, never at rest, so that export
    gives back the checkpoint's bytes.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        self.weight = nnx.Param(jnp.zeros((out_features, in_features)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((out_features,)))
        self.has_bias = bias

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.weight[...].astype(x.dtype)
        y32 = jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=jnp.float32)
        if self.has_bias:
            y32 = y32 + self.bias[...].astype(x.dtype).astype(jnp.float32)
        return y32.astype(x.dtype)


class Embedding(nnx.Module):
    """Rows of a ``[V, D]`` table. An id outside the vocabulary gives NaN, not another token's row."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        self.weight = nnx.Param(jnp.zeros((num_embeddings, embedding_dim)))
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim

    def __call__(self, ids_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return jnp.take(self.weight[...], ids_BT, axis=0, mode="fill", fill_value=jnp.nan).astype(dtype)

    def attend(self, x_BTD: jax.Array) -> jax.Array:
        """Logits of a tied head: x Eᵀ, accumulated in float32."""
        weight_VD = self.weight[...].astype(x_BTD.dtype)
        return jnp.einsum("btd,vd->btv", x_BTD, weight_VD, preferred_element_type=jnp.float32).astype(x_BTD.dtype)
