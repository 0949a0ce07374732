"""Gated delta net: linear attention whose state forgets by a gate and learns by the delta rule.

Source: arXiv:2412.06464; transformers ``Qwen3_5GatedDeltaNet``. Letters beyond the usual: docs/glossary.md.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jax_models.layers.linear import Linear
from jax_models.layers.norm import RMSNormGated
from jax_models.layers.step import Entry, LayerCache, Step
from jax_models.taps import tap

CHUNK = 64  # tokens whose mutual effect is solved at once
L2_EPS = 1e-6  # inside the sum, whatever the config's eps
# The state is float32 and must stay so: a TPU would multiply it in bfloat16, whatever the weights are
_exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class CausalConv1d(nnx.Module):
    """Every channel's sum over its last W values, weighted; the newest last. Weight [Z, 1, W], no bias."""

    def __init__(self, channels: int, taps: int) -> None:
        self.weight = nnx.Param(jnp.zeros((channels, 1, taps)))

    def __call__(self, x_BSZ: jax.Array, length: int) -> jax.Array:
        """The last ``length`` sums, [B, T, Z] in float32, of values that begin W - 1 before them."""
        weight_ZW = self.weight[...][:, 0].astype(jnp.float32)
        x_BSZ = x_BSZ.astype(jnp.float32)
        taps = weight_ZW.shape[1]
        return sum(
            (x_BSZ[:, tap : tap + length] * weight_ZW[:, tap] for tap in range(1, taps)),
            x_BSZ[:, :length] * weight_ZW[:, 0],
        )


class GatedDeltaNet(nnx.Module):
    """Projections, convolution, delta rule, gated norm, projection. The state is float32 whatever is computed in.

    A padded token changes nothing: it enters the convolution as zero, decays nothing and writes nothing.
    """

    path: str = ""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_key_heads: int,
        num_value_heads: int,
        key_head_dim: int,
        value_head_dim: int,
        taps: int,
        eps: float,
    ) -> None:
        self.key_dim, self.value_dim = num_key_heads * key_head_dim, num_value_heads * value_head_dim
        channels = 2 * self.key_dim + self.value_dim
        self.in_proj_qkv = Linear(hidden_size, channels)
        self.in_proj_z = Linear(hidden_size, self.value_dim)
        self.in_proj_b = Linear(hidden_size, num_value_heads)
        self.in_proj_a = Linear(hidden_size, num_value_heads)
        self.conv1d = CausalConv1d(channels, taps)
        self.dt_bias = nnx.Param(jnp.zeros((num_value_heads,)))
        self.A_log = nnx.Param(jnp.zeros((num_value_heads,)))
        self.norm = RMSNormGated(value_head_dim, eps=eps)
        self.out_proj = Linear(self.value_dim, hidden_size)
        self.num_key_heads, self.num_value_heads = num_key_heads, num_value_heads
        self.key_head_dim, self.value_head_dim = key_head_dim, value_head_dim
        self.taps = taps

    def __call__(
        self, x_BTD: jax.Array, step: Step, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        B, T, _ = x_BTD.shape
        mask_BT1 = step.mask_BT[..., None]
        x_BTD = x_BTD * mask_BT1
        qkv_BTZ = tap(self.path, "in_proj_qkv", self.in_proj_qkv(x_BTD))
        before_BWZ = jnp.zeros((B, self.taps - 1, qkv_BTZ.shape[2]), qkv_BTZ.dtype) if cache is None else cache["conv"]
        window_BSZ = jnp.concatenate([before_BWZ, qkv_BTZ], axis=1)
        mixed_BTZ = jax.nn.silu(self.conv1d(window_BSZ, T)).astype(x_BTD.dtype)
        mixed_BTZ = tap(self.path, "conv1d", mixed_BTZ).astype(jnp.float32)
        q_BTK, k_BTK, v_BTV = jnp.split(mixed_BTZ, [self.key_dim, 2 * self.key_dim], axis=-1)
        q_BTJP, k_BTJP = (self._spread(part.reshape(B, T, -1, self.key_head_dim)) for part in (q_BTK, k_BTK))
        v_BTJY = v_BTV.reshape(B, T, -1, self.value_head_dim)
        rate_BTJ = tap(self.path, "in_proj_a", self.in_proj_a(x_BTD)).astype(jnp.float32)
        rate_BTJ = jax.nn.softplus(rate_BTJ + self.dt_bias[...].astype(jnp.float32))
        decay_BTJ = -jnp.exp(self.A_log[...].astype(jnp.float32)) * rate_BTJ * mask_BT1
        decay_BTJ = tap(self.path, "decay", decay_BTJ)
        beta_BTJ = tap(self.path, "in_proj_b", self.in_proj_b(x_BTD)).astype(jnp.float32)
        beta_BTJ = tap(self.path, "beta", jax.nn.sigmoid(beta_BTJ) * mask_BT1)
        state_BJPY = jnp.zeros((B, self.num_value_heads, self.key_head_dim, self.value_head_dim))
        if cache is not None:
            state_BJPY = cache["state"]
        parts = (q_BTJP * self.key_head_dim**-0.5, k_BTJP, v_BTJY, decay_BTJ, beta_BTJ)
        if T == 1 or step.keep_history:
            out_BTJY, states_BTJPY = recurrent_delta_rule(*parts, state_BJPY)
            state_BJPY = states_BTJPY[:, -1]
        else:
            states_BTJPY = None
            out_BTJY, state_BJPY = chunked_delta_rule(*parts, state_BJPY)
        if cache is not None and step.keep_history:
            assert states_BTJPY is not None
            cache = {**cache, "conv_history": window_BSZ, "state_history": states_BTJPY}
        elif cache is not None:
            cache = {"conv": window_BSZ[:, T:], "state": state_BJPY}
        gate_BTJY = tap(self.path, "in_proj_z", self.in_proj_z(x_BTD)).reshape(B, T, -1, self.value_head_dim)
        out_BTJY = tap(self.path, "delta_rule", out_BTJY.astype(x_BTD.dtype))
        out_BTJY = tap(self.path, "norm", self.norm(out_BTJY, gate_BTJY))
        return tap(self.path, "out_proj", self.out_proj(out_BTJY.reshape(B, T, -1))), cache

    def _spread(self, x_BTIP: jax.Array) -> jax.Array:
        """Normed, and each key head repeated for its value heads."""
        normed_BTIP = x_BTIP * jax.lax.rsqrt(jnp.sum(x_BTIP * x_BTIP, axis=-1, keepdims=True) + L2_EPS)
        return jnp.repeat(normed_BTIP, self.num_value_heads // self.num_key_heads, axis=2)


def delta_entries(rows: int, *, channels: int, taps: int, state: tuple[int, int, int]) -> dict[str, Entry]:
    """What a gated delta net keeps: the last W - 1 inputs of its convolution, and its state [J, P, Y], float32."""
    return {
        "conv": Entry((rows, taps - 1, channels), ("B", "W", "QKV")),
        "state": Entry((rows, *state), ("B", "LN", "P", "Y"), jnp.float32),
    }


def keep_first(history: LayerCache, count_B: jax.Array) -> LayerCache:
    """What a layer keeps after the first ``count_B`` tokens (1 and more) of the run that left this history."""
    if not history:
        return {}
    window_BSZ, states_BTJPY = history["conv_history"], history["state_history"]
    width = window_BSZ.shape[1] - states_BTJPY.shape[1]

    def row(window_SZ: jax.Array, states_TJPY: jax.Array, count: jax.Array) -> LayerCache:
        conv_WZ = jax.lax.dynamic_slice_in_dim(window_SZ, count, width)
        return {"conv": conv_WZ, "state": states_TJPY[count - 1]}

    return jax.vmap(row)(window_BSZ, states_BTJPY, count_B)


def recurrent_delta_rule(
    q_BTJP: jax.Array,
    k_BTJP: jax.Array,
    v_BTJY: jax.Array,
    decay_BTJ: jax.Array,
    beta_BTJ: jax.Array,
    state_BJPY: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Token by token: what is read, [B, T, J, Y], and the state after every token, [B, T, J, P, Y]; float32."""

    def token(state_BJPY: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        q_BJP, k_BJP, v_BJY, decay_BJ, beta_BJ = now
        state_BJPY = state_BJPY * jnp.exp(decay_BJ)[..., None, None]
        known_BJY = _exact("bjp,bjpy->bjy", k_BJP, state_BJPY)
        news_BJY = (v_BJY - known_BJY) * beta_BJ[..., None]
        state_BJPY = state_BJPY + k_BJP[..., None] * news_BJY[..., None, :]
        return state_BJPY, (_exact("bjp,bjpy->bjy", q_BJP, state_BJPY), state_BJPY)

    by_token = [jnp.moveaxis(x, 1, 0) for x in (q_BTJP, k_BTJP, v_BTJY, decay_BTJ, beta_BTJ)]
    _, (out, states) = jax.lax.scan(token, state_BJPY, tuple(by_token))
    return jnp.moveaxis(out, 0, 1), jnp.moveaxis(states, 0, 1)


def chunked_delta_rule(
    q_BTJP: jax.Array,
    k_BTJP: jax.Array,
    v_BTJY: jax.Array,
    decay_BTJ: jax.Array,
    beta_BTJ: jax.Array,
    state_BJPY: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The same, chunk by chunk: what is read, [B, T, J, Y], and the last state, [B, J, P, Y]; float32.

    Within a chunk, what a token writes depends on what the tokens before it wrote: a triangular system, solved once
    for the part that does not know the state before the chunk and once for the part that multiplies it.
    """
    T = q_BTJP.shape[1]
    size = min(CHUNK, T)

    def chunked(x: jax.Array) -> jax.Array:  # [B, T, J, ...] -> chunks of [B, J, Q, ...]
        x = jnp.pad(x, ((0, 0), (0, -T % size), *((0, 0),) * (x.ndim - 2)))
        x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
        return jnp.swapaxes(jnp.moveaxis(x, 1, 0), 2, 3)

    q, k, v = (chunked(x) for x in (q_BTJP, k_BTJP, v_BTJY))
    beta, decay = chunked(beta_BTJ[..., None]), jnp.cumsum(chunked(decay_BTJ[..., None])[..., 0], axis=-1)
    later = jnp.triu(jnp.ones((size, size), bool), 1)
    between = jnp.exp(jnp.where(later, -jnp.inf, decay[..., :, None] - decay[..., None, :]))
    system = _exact("objqp,objrp->objqr", beta * k, k) * between
    known = jnp.concatenate([beta * v, beta * k * jnp.exp(decay)[..., None]], axis=-1)
    solved = jax.lax.linalg.triangular_solve(system, known, left_side=True, lower=True, unit_diagonal=True)
    value, key = jnp.split(solved, [v.shape[-1]], axis=-1)
    scores = _exact("objqp,objrp->objqr", q, k) * between
    q_decayed = q * jnp.exp(decay)[..., None]
    k_decayed = k * jnp.exp(decay[..., -1:] - decay)[..., None]

    def chunk(state_BJPY: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        value_BJQY, key_BJQP, scores_BJQQ, q_BJQP, k_BJQP, fading_BJ = now
        news_BJQY = value_BJQY - _exact("bjqp,bjpy->bjqy", key_BJQP, state_BJPY)
        read_BJQY = _exact("bjqp,bjpy->bjqy", q_BJQP, state_BJPY)
        read_BJQY = read_BJQY + _exact("bjqr,bjry->bjqy", scores_BJQQ, news_BJQY)
        written_BJPY = _exact("bjqp,bjqy->bjpy", k_BJQP, news_BJQY)
        return state_BJPY * jnp.exp(fading_BJ)[..., None, None] + written_BJPY, read_BJQY

    state_BJPY, out = jax.lax.scan(chunk, state_BJPY, (value, key, scores, q_decayed, k_decayed, decay[..., -1]))
    out = jnp.moveaxis(jnp.swapaxes(out, 2, 3), 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :T], state_BJPY
