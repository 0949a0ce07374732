"""Grouped-query attention with per-head q/k norms, and the cache it appends to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jax_models.layers.fp8 import cache_scales, fp8_kept
from jax_models.layers.linear import Linear
from jax_models.layers.norm import GemmaRMSNorm, RMSNorm
from jax_models.layers.rotary import rotate
from jax_models.layers.step import Entry, LayerCache, Step
from jax_models.taps import tap
from loaders.quantization import KVCache


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


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    visible_BTS: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """softmax(scale · q kᵀ) v over the keys a query may see, [B, T, N, H]; scores and softmax in float32.

    Args:
        q_BTNH: queries.
        k_BSKH: keys, each for N/K query heads.
        v_BSKH: values.
        visible_BTS: bool, which keys each query may see.
        scale: None: 1 / √H.
        softcap: scores are squeezed into ±softcap before the mask, softcap · tanh(score / softcap); None: they are not.
    """
    if softcap is None:
        return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=visible_BTS[:, None], scale=scale)
    q_BTKGH = q_BTNH.reshape(*q_BTNH.shape[:2], k_BSKH.shape[2], -1, q_BTNH.shape[3])
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKGTS * (q_BTNH.shape[3] ** -0.5 if scale is None else scale)
    scores_BKGTS = jnp.tanh(scores_BKGTS / softcap) * softcap
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weight_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weight_BKGTS, v_BSKH).reshape(q_BTNH.shape)


class Attention(nnx.Module):
    """Softmax attention with norms of q and k before they are rotated. Source: transformers ``Qwen3Attention``.

    Args:
        hidden_size: D.
        num_heads: N.
        num_kv_heads: K.
        head_dim: H.
        eps: of the norms.
        bias: every projection has one.
        norm: what q and k are normed by.
        scale: see ``attend``.
        softcap: see ``attend``.
    """

    path: str = ""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        bias: bool,
        norm: type[RMSNorm] | type[GemmaRMSNorm] = RMSNorm,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        self.q_proj = Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.q_norm = norm(head_dim, eps=eps)
        self.k_norm = norm(head_dim, eps=eps)
        self.head_dim = head_dim
        self.scale = scale
        self.softcap = softcap
        self.rounds_cache: KVCache | None = None  # keys and values go through FP8

    def __call__(
        self, x_BTD: jax.Array, step: Step, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTNH = tap(self.path, "q_proj", self.q_proj(x_BTD)).reshape(heads)
        k_BTKH = tap(self.path, "k_proj", self.k_proj(x_BTD)).reshape(heads)
        v_BTKH = tap(self.path, "v_proj", self.v_proj(x_BTD)).reshape(heads)
        q_BTNH = tap(self.path, "q_norm", self.q_norm(q_BTNH))
        q_BTNH = tap(self.path, "q_rotated", rotate(q_BTNH, step.cos_BTR, step.sin_BTR))
        k_BTKH = tap(self.path, "k_norm", self.k_norm(k_BTKH))
        k_BTKH = tap(self.path, "k_rotated", rotate(k_BTKH, step.cos_BTR, step.sin_BTR))
        if self.rounds_cache:
            k_scale, v_scale = cache_scales(self.k_proj, self.v_proj, self.rounds_cache)
            k_BTKH, v_BTKH = fp8_kept(k_BTKH, k_scale), fp8_kept(v_BTKH, v_scale)
        k_BSKH, v_BSKH, cache = remembered(k_BTKH, v_BTKH, step, cache)
        out_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, step.visible_BTS, scale=self.scale, softcap=self.softcap)
        out_BTNH = tap(self.path, "attention", out_BTNH)
        return tap(self.path, "o_proj", self.o_proj(out_BTNH.reshape(*x_BTD.shape[:2], -1))), cache
