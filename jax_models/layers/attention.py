"""Grouped-query attention with per-head q/k norms, and the cache it appends to."""

from __future__ import annotations

import jax
from flax import nnx

from jax_models.layers.linear import Linear
from jax_models.layers.norm import RMSNorm
from jax_models.layers.rotary import rotate
from jax_models.layers.step import Entry, LayerCache, Step


def key_value_entries(rows: int, capacity: int, num_kv_heads: int, head_dim: int) -> dict[str, Entry]:
    """What attention keeps: keys (rotated) and values, [B, S, K, H] in the compute dtype."""
    shape, axes = (rows, capacity, num_kv_heads, head_dim), ("B", "S", "KH", "H")
    return {"key": Entry(shape, axes), "value": Entry(shape, axes)}


def remembered(
    k_BTKH: jax.Array, v_BTKH: jax.Array, step: Step, cache: LayerCache | None
) -> tuple[jax.Array, jax.Array, LayerCache | None]:
    """All keys and values so far, [B, S, K, H], those given among them, and the cache that holds them."""
    if cache is None:
        return k_BTKH, v_BTKH, None
    k_BSKH = jax.lax.dynamic_update_slice_in_dim(cache["key"], k_BTKH, step.start, axis=1)
    v_BSKH = jax.lax.dynamic_update_slice_in_dim(cache["value"], v_BTKH, step.start, axis=1)
    return k_BSKH, v_BSKH, {"key": k_BSKH, "value": v_BSKH}


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
        self, x_BTD: jax.Array, step: Step, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTNH = rotate(self.q_norm(self.q_proj(x_BTD).reshape(heads)), step.cos_BTR, step.sin_BTR)
        k_BTKH = rotate(self.k_norm(self.k_proj(x_BTD).reshape(heads)), step.cos_BTR, step.sin_BTR)
        k_BSKH, v_BSKH, cache = remembered(k_BTKH, self.v_proj(x_BTD).reshape(heads), step, cache)
        out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=step.visible_BTS[:, None])
        return self.o_proj(out_BTNH.reshape(*x_BTD.shape[:2], -1)), cache
