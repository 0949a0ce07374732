"""Grouped-query attention with per-head q/k norms, and the cache it appends to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx
from jax.sharding import Mesh

from jax_models.kernels import held_attention, prompt_attention
from jax_models.layers.cached_attention import Given, attend_apart, attend_joined, attend_written, mixed, written
from jax_models.layers.fp8 import cache_scales, fp8_kept
from jax_models.layers.linear import Linear
from jax_models.layers.norm import GemmaRMSNorm, RMSNorm
from jax_models.layers.rotary import rotate
from jax_models.layers.step import Entry, LayerCache, Step
from jax_models.sharding import entry_sharding
from jax_models.taps import tap
from loaders.quantization.schemes import KVCache


def key_value_entries(rows: int, capacity: int, num_kv_heads: int, head_dim: int) -> dict[str, Entry]:
    """What attention keeps: keys (rotated) and values, [B, K, S, H] in the compute dtype.

    Heads come before slots, so that what a head reads lies together: XLA:CPU reads it 3 times as fast as [B, S, K, H].
    """
    shape, axes = (rows, num_kv_heads, capacity, head_dim), ("B", "KH", "S", "H")
    return {"key": Entry(shape, axes), "value": Entry(shape, axes)}


def remembered(k_BTKH: jax.Array, v_BTKH: jax.Array, step: Step, cache: LayerCache | None) -> LayerCache | None:
    """The cache with the keys and values given in their slots; None without one."""
    if cache is None:
        return None
    return {
        "key": written(cache["key"], k_BTKH, step.start),
        "value": written(cache["value"], v_BTKH, step.start),
    }


def cut_as_kept(k_BTKH: jax.Array, v_BTKH: jax.Array, cache: LayerCache | None, mesh: Mesh | None) -> list[jax.Array]:
    """Keys and values where the cache has them, though queries may be cut further.

    Cut as those, they make XLA gather all of the cache at every step, to write a row of it.
    """
    if cache is None or mesh is None:
        return [k_BTKH, v_BTKH]
    cuts = entry_sharding(mesh, k_BTKH.shape, ("B", "T", "KH", "H"))
    return [jax.lax.with_sharding_constraint(new, cuts) for new in (k_BTKH, v_BTKH)]


def in_turn(
    out_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, step: Step, cache: LayerCache | None
) -> tuple[jax.Array, LayerCache | None]:
    """What attention gives, and the cache with these keys and values; on a TPU in that order, and before any use.

    Otherwise XLA may write a cache before it is read, and reads a copy of it; or it writes every layer's when all of
    them are done: rows wait in HBM for it, and caches in VMEM, from which they are then written back whole.
    """
    if cache is None or step.is_first:
        return out_BTNH, remembered(k_BTKH, v_BTKH, step, cache)

    def by_xla(out_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, LayerCache | None]:
        return out_BTNH, remembered(k_BTKH, v_BTKH, step, cache)

    def on_tpu(*given: jax.Array) -> tuple[jax.Array, LayerCache | None]:
        return jax.lax.optimization_barrier(by_xla(*jax.lax.optimization_barrier(given)))

    return jax.lax.platform_dependent(out_BTNH, k_BTKH, v_BTKH, tpu=on_tpu, default=by_xla)


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
    return mixed(q_BTNH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2), visible_BTS, scale, softcap)


def attend_alone(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    step: Step,
    mesh: Mesh | None,
    *,
    scale: float | None,
    softcap: float | None,
) -> jax.Array:
    """``attend`` of tokens that nothing came before, [B, T, N, H]; of many on a TPU by a kernel that stores no scores.

    Arguments as of ``attend_cached``.
    """

    def by_xla(*given: jax.Array) -> jax.Array:
        q_BTNH, k_BTKH, v_BTKH, visible_BTT, _ = given
        return attend(q_BTNH, k_BTKH, v_BTKH, visible_BTT, scale=scale, softcap=softcap)

    def by_kernel(*given: jax.Array) -> jax.Array:
        q_BTNH, k_BTKH, v_BTKH, _, mask_BT = given
        factor = q_BTNH.shape[3] ** -0.5 if scale is None else scale
        options = {"softcap": softcap, "window": step.window, "mesh": mesh}
        return prompt_attention.attend_prompt(q_BTNH, k_BTKH, v_BTKH, mask_BT, scale=factor, **options)

    given = (q_BTNH, k_BTKH, v_BTKH, step.visible_BTS, step.mask_BT)
    return (
        jax.lax.platform_dependent(*given, tpu=by_kernel, default=by_xla)
        if prompt_attention.takes(q_BTNH)
        else by_xla(*given)
    )


def attend_cached(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    step: Step,
    cache: LayerCache | None,
    mesh: Mesh | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """``attend`` over what the cache held before these tokens, and over their own keys and values, [B, T, N, H].

    Args:
        q_BTNH: queries.
        k_BTKH: keys of the same tokens.
        v_BTKH: values.
        step: where they stand, and which keys each may see.
        cache: what came before; None: nothing did.
        mesh: devices that heads are cut over.
        scale: see ``attend``.
        softcap: see ``attend``.
    """
    if cache is None or step.is_first:
        return attend_alone(q_BTNH, k_BTKH, v_BTKH, step, mesh, scale=scale, softcap=softcap)
    given = Given(q_BTNH, k_BTKH, v_BTKH, step.start, step.visible_BTS, cache["key"], cache["value"])
    by_platform: dict[str, Callable[..., jax.Array]] = {"cpu": attend_written, "default": attend_apart}
    if held_attention.takes(q_BTNH, cache["key"], mesh):
        by_platform["tpu"] = partial(attend_joined, mesh=mesh)
    options = {"scale": scale, "softcap": softcap}
    return jax.lax.platform_dependent(given, **{name: partial(way, **options) for name, way in by_platform.items()})


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
        mesh: devices that heads are cut over.
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
        mesh: Mesh | None,
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
        self.mesh = mesh
        self.kv_cache: KVCache | None = None  # keys and values go through FP8

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
        if self.kv_cache:
            k_scale, v_scale = cache_scales(self.k_proj, self.v_proj, self.kv_cache)
            k_BTKH, v_BTKH = fp8_kept(k_BTKH, k_scale), fp8_kept(v_BTKH, v_scale)
        k_BTKH, v_BTKH = cut_as_kept(k_BTKH, v_BTKH, cache, self.mesh)
        options = {"scale": self.scale, "softcap": self.softcap}
        out_BTNH = tap(self.path, "attention", attend_cached(q_BTNH, k_BTKH, v_BTKH, step, cache, self.mesh, **options))
        out_BTNH, cache = in_turn(out_BTNH, k_BTKH, v_BTKH, step, cache)
        return tap(self.path, "o_proj", self.o_proj(out_BTNH.reshape(*x_BTD.shape[:2], -1))), cache
