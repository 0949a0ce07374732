"""Grouped-query attention with per-head q/k norms, and the cache it appends to."""

from __future__ import annotations

from typing import TypedDict

import jax
import jax.numpy as jnp
from flax import nnx

from jax_models.layers.linear import Linear
from jax_models.layers.norm import RMSNorm
from jax_models.layers.rotary import rotate


class LayerCache(TypedDict):
    """Keys (rotated) and values of one layer, [B, S, K, H] in the compute dtype."""

    key: jax.Array
    value: jax.Array


def visible(key_mask_BS: jax.Array, start: jax.Array | int, length: int, window: int | None) -> jax.Array:
    """Which keys each of ``length`` queries from slot ``start`` on may see, bool [B, T, S].

    Real keys not after the query, at most ``window`` of them with itself; and always itself, so that a padded query has
    something to average and stays finite.
    """
    query_T1 = start + jnp.arange(length)[:, None]
    key_1S = jnp.arange(key_mask_BS.shape[1])[None, :]
    causal_TS = key_1S <= query_T1
    if window is not None:
        causal_TS &= key_1S > query_T1 - window
    return (causal_TS[None] & key_mask_BS[:, None, :]) | (key_1S == query_T1)[None]


class Attention(nnx.Module):
    """softmax(q kᵀ / √H) v over the keys a query may see; scores and softmax in float32.

    Source: transformers ``Qwen3Attention``.
    """

    def __init__(
        self, hidden_size: int, *, num_heads: int, num_kv_heads: int, head_dim: int, eps: float, bias: bool
    ) -> None:
        self.q_proj = Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.q_norm = RMSNorm(head_dim, eps=eps)
        self.k_norm = RMSNorm(head_dim, eps=eps)
        self.head_dim = head_dim

    def __call__(
        self,
        x_BTD: jax.Array,
        cos_BTR: jax.Array,
        sin_BTR: jax.Array,
        visible_BTS: jax.Array,
        cache: LayerCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, LayerCache | None]:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTNH = rotate(self.q_norm(self.q_proj(x_BTD).reshape(heads)), cos_BTR, sin_BTR)
        k_BSKH = rotate(self.k_norm(self.k_proj(x_BTD).reshape(heads)), cos_BTR, sin_BTR)
        v_BSKH = self.v_proj(x_BTD).reshape(heads)
        if cache is not None:
            k_BSKH = jax.lax.dynamic_update_slice_in_dim(cache["key"], k_BSKH, start, axis=1)
            v_BSKH = jax.lax.dynamic_update_slice_in_dim(cache["value"], v_BSKH, start, axis=1)
            cache = LayerCache(key=k_BSKH, value=v_BSKH)
        out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=visible_BTS[:, None])
        return self.o_proj(out_BTNH.reshape(*x_BTD.shape[:2], -1)), cache
