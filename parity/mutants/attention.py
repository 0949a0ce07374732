"""Mutants of attention, its norms and its rotary embedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from parity.mutants import Mutant, Patch
from parity.mutants.bench import decode
from parity.mutants.detectors import inside
from parity.mutants.plants import (
    BIAS,
    BOTH,
    SLIDING,
    YARN,
    at_backend,
    attending,
    bfloat16,
    each,
    exchanged,
    of,
    rms,
    subclassed,
    swapping,
    uncached,
    wrapped,
    xp,
)
from parity.zoo import ZOO

_RELATIVE = "rotary embedding is relative: only differences of positions reach a score"
_CALL = "layers.attention:Attention.CALL"
_NORM = "layers.norm:RMSNorm"
_WINDOW = "loaders.qwen3:Qwen3Config.window"
_ROPE = "layers.step:rotary_embedding"
_BUILD = "layers.attention:Attention.__init__"


def _with_norm(change: Callable[[Any, Any, Any], Any]) -> Callable[[Any, str], Any]:
    """Attention whose q/k norm computes ``change(array module, norm, x)``."""

    def make(build: Any, backend: str) -> Any:
        normal = import_module(f"{backend}_models.layers.norm").RMSNorm
        norm = subclassed(normal, backend, lambda self, x: change(xp(backend), self, x))
        return lambda self, *args, **kw: build(self, *args, **kw | {"norm": norm})

    return make


def _full_width(np_: Any, self: Any, x: Any) -> Any:
    return self.weight[...] * rms(np_, x, self.eps, (-2, -1))


def _norm_after_rope() -> list[Patch]:
    waiting: list[Callable[[Any], Any]] = []  # q_norm, rotate, k_norm, rotate: each norm waits for the next rotation

    def late(np_: Any, self: Any, x: Any) -> Any:
        waiting.append(lambda rotated: self.weight[...] * rms(np_, rotated, self.eps))
        return x

    def rotate(original: Any, backend: str) -> Any:
        return lambda *args: waiting.pop()(original(*args))

    return [Patch(_BUILD, _with_norm(late)), Patch("layers.attention:rotate", rotate)]


def _with_eps(attend: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    kept = self.k_norm.eps
    self.k_norm.eps += 1e-5
    try:
        return attend(self, *args, **kwargs)
    finally:
        self.k_norm.eps = kept


def _interleaved(original: Any, np_: Any, x: Any, cos: Any, sin: Any) -> Any:
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos[:, :, None], sin[:, :, None]
    return np_.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


def _same(x: Any) -> Any:
    return x


def _tiled(np_: Any, axis: int, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any, dict[str, Any], Any]:
    groups = q.shape[axis] // k.shape[axis]
    return q, np_.concatenate([k] * groups, axis), np_.concatenate([v] * groups, axis), {}, _same


def _hidden_scale(np_: Any, axis: int, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any, dict[str, Any], Any]:
    config = ZOO["qwen3"].config
    return q, k, v, {"scale": (config["hidden_size"] / config["num_attention_heads"]) ** -0.5}, _same


def _one_louder(np_: Any, axis: int, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any, dict[str, Any], Any]:
    def louder(out: Any) -> Any:
        factors = np_.ones(out.shape[axis])
        factors[4] = 1.01
        return out * factors.reshape(-1, *(1,) * (out.ndim - axis - 1))

    return q, k, v, {}, louder


def _head_major(np_: Any, axis: int, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any, dict[str, Any], Any]:
    def mixed(out: Any) -> Any:  # [.., N, H] laid out as [.., H, N]
        out_BTNH = np_.swapaxes(out, 1, 2) if axis == 1 else out
        out_BTNH = np_.swapaxes(out_BTNH, 2, 3).reshape(out_BTNH.shape)
        return np_.swapaxes(out_BTNH, 1, 2) if axis == 1 else out_BTNH

    return q, k, v, {}, mixed


def _later(original: Any, np_: Any, self: Any, *args: Any) -> Any:
    """One more position for a decoded token."""
    if np_.__name__ == "torch":
        ids_B1, cache = args
        cache.position += 1
        logits = original(self, ids_B1, cache)
        cache.position -= 1
        return logits
    given, inputs, cache, *rest = args
    logits, cache = original(self, given, inputs, dataclasses.replace(cache, position=cache.position + 1), *rest)
    return logits, dataclasses.replace(cache, position=cache.position - 1)


def _decode_positions() -> list[Patch]:
    def make(original: Any, backend: str) -> Any:
        return lambda self, *args, **kw: _later(original, xp(backend), self, *args, *kw.values())

    return [Patch("programs:Programs.decode_step", make, in_torch="decoding:Decoding.decode_step")]


def _slot_before(original: Any, self: Any, x: Any, step: Any, cache: Any = None) -> Any:
    is_decoded = cache is not None and x.shape[1] == 1
    return original(self, x, dataclasses.replace(step, start=step.start - 1) if is_decoded else step, cache)


def _yarn(name: str, change: Callable[..., Any]) -> Callable[[], list[Patch]]:
    """Change part of YaRN, and keep no frequencies from before."""
    anew = Patch("layers.rotary:_static_frequencies", uncached)
    return lambda: [anew, *wrapped(f"layers.rotary:{name}", change)()]


def _unshifted(original: Any, *given: Any, **options: Any) -> Any:
    checked = original(*given, **options)
    counted = np.broadcast_to(np.arange(checked.input_ids.shape[1], dtype=np.int32), checked.input_ids.shape)
    return dataclasses.replace(checked, position_ids=counted)


def _attention(*args: Any, **more: Any) -> Mutant:
    return of("attention", *args, **more)


ATTENTION: list[Mutant] = [
    _attention(
        "qk_norm_swapped", "parity 1", swapping(_CALL, "q_norm", "k_norm"), "q_norm and k_norm swapped", backends=BOTH
    ),
    _attention(
        "q_norm_weight_dropped", "parity 2", each("q_norm", lambda np_, w: np_.ones_like(w)), "q_norm without weight"
    ),
    _attention(
        "k_norm_weight_dropped",
        "parity 2",
        each("k_norm", lambda np_, w: np_.ones_like(w)),
        "k_norm without weight",
        backends=("jax",),
    ),
    _attention(
        "norm_over_full_width",
        "parity 3",
        lambda: [Patch(_BUILD, _with_norm(_full_width))],
        "q/k norm over all heads at once, as OLMo has it",
    ),
    _attention("norm_after_rope", "parity 4", _norm_after_rope, "q/k norm after the rotation", backends=("torch",)),
    _attention(
        "norm_weight_plus_one",
        "parity 5",
        each("norm.weight", lambda np_, w: w + 1),
        "norm weight as 1 + w, as Gemma has it",
        backends=BOTH,
    ),
    _attention(
        "eps_too_large",
        "parity 6",
        wrapped(_NORM + ".__init__", lambda init, self, size, eps: init(self, size, eps=3 * eps)),
        "three times rms_norm_eps; the tiny canary row shows it most",
    ),
    _attention(
        "eps_zero",
        "parity 6",
        wrapped(_NORM + ".__init__", lambda init, self, size, eps: init(self, size, eps=0.0)),
        "rms_norm_eps left out",
        backends=BOTH,
    ),
    _attention(
        "k_norm_eps_too_large",
        "planted",
        wrapped(_CALL, _with_eps),
        "eps 1e-5 more in k_norm alone: a layer hides it among its own rounding",
        detector=inside,
    ),
    _attention(
        "block_norms_swapped",
        "parity 0.1",
        exchanged("input_layernorm", "post_attention_layernorm"),
        "input and post-attention norms swapped",
        backends=BOTH,
    ),
    _attention(
        "theta_wrong",
        "parity 7",
        wrapped(_ROPE, lambda rope, params, *args: rope(dataclasses.replace(params, rope_theta=1e4), *args)),
        "rope_theta 1e4 for 5e4",
        backends=BOTH,
    ),
    _attention(
        "rope_interleaved",
        "parity 8",
        at_backend("layers.attention:rotate", _interleaved),
        "even and odd dimensions paired, not halves",
        backends=BOTH,
    ),
    _attention(
        "rope_sign",
        "parity 9",
        wrapped("layers.attention:rotate", lambda rotate, x, cos, sin: rotate(x, cos, -sin)),
        "rotation the other way round",
    ),
    _attention(
        "rope_inbfloat16",
        "parity 10",
        wrapped(_ROPE, lambda rope, *args: tuple(map(bfloat16, rope(*args)))),
        "cos and sin rounded to bfloat16",
    ),
    _attention(
        "decode_position_plus_one",
        "parity 11",
        _decode_positions,
        "a decoded token one position too late",
        detector=decode,
        backends=BOTH,
    ),
    _attention(
        "positions_plus_one",
        "parity 11",
        wrapped(_ROPE, lambda rope, params, h, longest, positions, n: rope(params, h, longest, positions + 1, n)),
        "all positions one too late",
        equivalent=_RELATIVE,
    ),
    _attention(
        "left_pads_counted",
        "parity 12",
        wrapped("model:check_inputs", _unshifted),
        "positions counted over padding too",
        equivalent=_RELATIVE,
    ),
    _attention(
        "left_pads_counted_in_prefill",
        "parity 12",
        wrapped("model:check_inputs", _unshifted),
        "positions counted over padding in the whole prompt, over real tokens when decoding",
        detector=decode,
        equivalent="prefill moves rows to the end and counts positions itself, whatever was said of the whole prompt",
    ),
    _attention(
        "yarn_factor_dropped",
        "parity 13",
        _yarn("_yarn_attention_factor", lambda factor, rope: 1.0),
        "YaRN without its attention factor",
        subject=YARN,
        backends=BOTH,
    ),
    _attention(
        "yarn_not_interpolated",
        "parity 13",
        _yarn("_yarn_frequencies", lambda yarn, rope, h, period: (1 / period, yarn(rope, h, period)[1])),
        "YaRN with the original frequencies",
        subject=YARN,
    ),
    _attention("kv_heads_tiled", "parity 14", attending(_tiled), "key/value heads tiled, not repeated", backends=BOTH),
    _attention(
        "one_head_louder",
        "planted",
        attending(_one_louder),
        "what one head of six says, one percent too large",
        backends=("torch",),
    ),
    _attention(
        "scale_from_hidden",
        "parity 15",
        attending(_hidden_scale),
        "scores scaled by hidden_size / heads, not head_dim",
        backends=("torch",),
    ),
    _attention(
        "sees_next_token",
        "parity 16",
        wrapped("layers.step:visible", lambda visible, mask, start, *rest: visible(mask, start + 1, *rest)),
        "causal mask off by one",
        backends=BOTH,
    ),
    _attention(
        "window_plus_one",
        "parity 16",
        wrapped(_WINDOW, lambda window, self, i: n + 1 if (n := window(self, i)) else n),
        "sliding window one key too wide",
        subject=SLIDING,
        backends=("torch",),
    ),
    _attention(
        "window_minus_one",
        "parity 16",
        wrapped(_WINDOW, lambda window, self, i: n - 1 if (n := window(self, i)) else n),
        "sliding window without the query itself",
        subject=SLIDING,
    ),
    _attention(
        "window_always_on",
        "parity 17",
        wrapped(_WINDOW, lambda window, self, i: 24),
        "a window although use_sliding_window is false",
    ),
    _attention(
        "window_never_on",
        "parity 17",
        wrapped(_WINDOW, lambda window, self, i: None),
        "no window although layer_types asks for it",
        subject=SLIDING,
    ),
    _attention(
        "window_on_wrong_layers",
        "parity 17",
        wrapped(_WINDOW, lambda window, self, i: window(self, 1 - i)),
        "full and sliding layers exchanged",
        subject=SLIDING,
    ),
    _attention(
        "heads_interleaved_for_o_proj",
        "parity 18",
        attending(_head_major),
        "o_proj reads its input with heads inside",
        backends=("torch",),
    ),
    _attention(
        "cache_slot_before",
        "parity 20",
        wrapped(_CALL, _slot_before),
        "a decoded token overwrites the key before it",
        detector=decode,
        backends=("jax",),
    ),
    _attention(
        "padding_visible",
        "parity 21",
        at_backend("layers.step:visible", lambda visible, np_, mask, *rest: visible(np_.ones_like(mask), *rest)),
        "keys of padding are seen",
        backends=BOTH,
    ),
    _attention(
        "bias_dropped",
        "law 2",
        each("_proj.bias", lambda np_, w: 0 * w),
        "attention biases ignored",
        subject=BIAS,
        backends=BOTH,
    ),
]
