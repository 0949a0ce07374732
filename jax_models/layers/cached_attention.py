"""Attention of tokens that others came before: over a cache and over their own keys, in a way for each platform."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_models.kernels import held_attention


class Given(NamedTuple):
    """T tokens, and the cache as it was before them.

    Args:
        q_BTNH: queries.
        k_BTKH: keys of the same tokens.
        v_BTKH: values.
        start: int32 [], the slot of the first of them.
        visible_BTS: bool, which slots each may see, their own among them.
        held_k_BKSH: keys in slots before ``start``; in others anything.
        held_v_BKSH: values.
    """

    q_BTNH: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array
    start: jax.Array | int
    visible_BTS: jax.Array
    held_k_BKSH: jax.Array
    held_v_BKSH: jax.Array


def written(part_BKSH: jax.Array, new_BTKH: jax.Array, start: jax.Array | int) -> jax.Array:
    """Keys or values with those of T tokens from slot ``start`` on, [B, K, S, H]."""
    new_BKTH = new_BTKH.swapaxes(1, 2)
    return jax.lax.dynamic_update_slice_in_dim(part_BKSH, new_BKTH, start, axis=2, allow_negative_indices=False)


def attend_written(given: Given, *, scale: float | None, softcap: float | None) -> jax.Array:
    """``attend_cached`` where the cache is written first: XLA:CPU copies what is read before it is written in place."""
    k_BKSH = written(given.held_k_BKSH, given.k_BTKH, given.start)
    v_BKSH = written(given.held_v_BKSH, given.v_BTKH, given.start)
    return mixed(given.q_BTNH, k_BKSH, v_BKSH, given.visible_BTS, scale, softcap)


def attend_apart(given: Given, *, scale: float | None, softcap: float | None) -> jax.Array:
    """``attend_cached`` as one softmax over two parts, so that nothing reads the cache after it is written.

    Otherwise XLA for TPU brings the cache of every other layer to VMEM, writes the new row there and all of it back:
    295 MB a step and device beside 4.4 GB (Qwen3-8B on four v5e, B=8, S=2048).
    """
    q_BTNH, k_BTKH, v_BTKH, start, visible_BTS, k_BKSH, v_BKSH = given
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    is_held_S = jnp.arange(k_BKSH.shape[2]) < start
    own_BTT = _own(visible_BTS, start, k_BKTH.shape[2])
    held_BKGTS = _scores(q_BTNH, k_BKSH, visible_BTS & is_held_S, scale, softcap)
    own_BKGTT = _scores(q_BTNH, k_BKTH, own_BTT, scale, softcap)
    top_BKGT1 = jnp.maximum(held_BKGTS.max(axis=-1, keepdims=True), own_BKGTT.max(axis=-1, keepdims=True))
    held_BKGTS, own_BKGTT = jnp.exp(held_BKGTS - top_BKGT1), jnp.exp(own_BKGTT - top_BKGT1)
    total_BKGT1 = held_BKGTS.sum(axis=-1, keepdims=True) + own_BKGTT.sum(axis=-1, keepdims=True)
    held_BTKGH, own_BTKGH = (
        jnp.einsum("bkgts,bksh->btkgh", (exp / total_BKGT1).astype(v.dtype), v, preferred_element_type=jnp.float32)
        for exp, v in ((held_BKGTS, v_BKSH), (own_BKGTT, v_BKTH))
    )
    return (held_BTKGH + own_BTKGH).astype(q_BTNH.dtype).reshape(q_BTNH.shape)


def attend_joined(
    given: Given,
    *,
    scale: float | None,
    softcap: float | None,
    mesh: Mesh | None,
    interpret: bool = False,
) -> jax.Array:
    """``attend_apart`` with the part that was held by a kernel, which reads no more of the cache than is seen."""
    q_BTNH, k_BTKH, v_BTKH, start, visible_BTS, k_BKSH, v_BKSH = given
    (B, T, N, H), K = q_BTNH.shape, k_BKSH.shape[1]
    factor = H**-0.5 if scale is None else scale
    out_BTNH, log_sum_BTN = held_attention.attend_held(
        q_BTNH, k_BKSH, v_BKSH, visible_BTS, start, scale=factor, softcap=softcap, mesh=mesh, interpret=interpret
    )
    own_BKGTT = _scores(q_BTNH, k_BTKH.swapaxes(1, 2), _own(visible_BTS, start, T), scale, softcap)
    held_BKGT1 = log_sum_BTN.reshape(B, T, K, N // K).transpose(0, 2, 3, 1)[..., None]
    top_BKGT1 = jnp.maximum(held_BKGT1, own_BKGTT.max(axis=-1, keepdims=True))
    held_BKGT1, own_BKGTT = jnp.exp(held_BKGT1 - top_BKGT1), jnp.exp(own_BKGTT - top_BKGT1)
    total_BKGT1 = held_BKGT1 + own_BKGTT.sum(axis=-1, keepdims=True)
    weight_BKGTT = (own_BKGTT / total_BKGT1).astype(v_BTKH.dtype)
    own_BTKGH = jnp.einsum("bkgts,bskh->btkgh", weight_BKGTT, v_BTKH, preferred_element_type=jnp.float32)
    share_BTN1 = (held_BKGT1 / total_BKGT1).transpose(0, 3, 1, 2, 4).reshape(B, T, N, 1)
    return (out_BTNH * share_BTN1 + own_BTKGH.reshape(out_BTNH.shape)).astype(q_BTNH.dtype)


def _own(visible_BTS: jax.Array, start: jax.Array | int, length: int) -> jax.Array:
    """Which of their own keys ``length`` tokens see, bool [B, T, T]. One always sees itself, so nothing is looked up.

    Sliced out for one, a byte of it would lie in HBM, and one byte there makes libtpu give 16 KiB to each tuple of the
    program as well: 40 MB for 36 layers.
    """
    if length == 1:
        return jnp.ones_like(visible_BTS[:, :, :1])
    return jax.lax.dynamic_slice_in_dim(visible_BTS, start, length, axis=2, allow_negative_indices=False)


def mixed(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    visible_BTS: jax.Array,
    scale: float | None,
    softcap: float | None,
) -> jax.Array:
    """``jax_models.layers.attention.attend`` step by step, over keys and values whose heads come first."""
    scores_BKGTS = _scores(q_BTNH, k_BKSH, visible_BTS, scale, softcap)
    weight_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum("bkgts,bksh->btkgh", weight_BKGTS, v_BKSH).reshape(q_BTNH.shape)


def _scores(
    q_BTNH: jax.Array, k_BKSH: jax.Array, visible_BTS: jax.Array, scale: float | None, softcap: float | None
) -> jax.Array:
    """Scaled, capped and masked scores, float32 [B, K, G, T, S]."""
    q_BTKGH = q_BTNH.reshape(*q_BTNH.shape[:2], k_BKSH.shape[1], -1, q_BTNH.shape[3])
    scores_BKGTS = jnp.einsum("btkgh,bksh->bkgts", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKGTS * (q_BTNH.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores_BKGTS = jnp.tanh(scores_BKGTS / softcap) * softcap
    return jnp.where(visible_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
