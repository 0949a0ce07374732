"""Mutants of Gemma 3: two rotary embeddings, windows, caps, norms around every branch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from parity.mutants import Mutant, Patch
from parity.mutants.bench import Subject
from parity.mutants.detectors import rounding
from parity.mutants.plants import (
    BOTH,
    GEMMA,
    GEMMA_CAPPED,
    GEMMA_HALF,
    at_backend,
    exchanged,
    framework,
    of,
    subclassed,
    wrapped,
)

_CONFIG = "loaders.gemma3:Gemma3Config"
_MODEL = "gemma3:Gemma3ForCausalLM"


def _config(**changes: Any) -> Callable[[], list[Patch]]:
    """The checkpoint's config is read as if it said something else."""

    def read(original: Any, *args: Any) -> Any:
        config, problems = original(*args)
        return dataclasses.replace(config, **changes), problems

    return wrapped("loaders.gemma3:config_from_json", read)


def _unrounded(embed: Any, self: Any, ids: Any) -> Any:
    embed(self, ids)
    rows = self.model.embed_tokens(ids, self.dtype)
    wide = rows.float() if hasattr(rows, "float") else rows.astype("float32")
    product = wide * self.config.hidden_size**0.5
    return product.to(self.dtype) if hasattr(product, "to") else product.astype(self.dtype)


def _tapped(change: Callable[..., Any]) -> Callable[[], list[Patch]]:
    """``change`` stands in for ``embed``; its result is tapped, and not the right one."""
    taps: list[Any] = []

    def tap(original: Any, path: str, name: str, value: Any, level: str = "operations") -> Any:
        if name != "embed_tokens":
            return original(path, name, value, level)
        taps[:] = [original]
        return value

    def embed(original: Any, self: Any, ids: Any) -> Any:
        value = change(original, self, ids)
        return taps.pop()("model", "embed_tokens", value, "layers")

    return lambda: [*wrapped("gemma3:tap", tap)(), *wrapped(f"{_MODEL}.embed", embed)()]


def _unscaled(embed: Any, self: Any, ids: Any) -> Any:
    return embed(self, ids) / self.config.hidden_size**0.5


def _exchanged_ropes(rope: Any, self: Any, layer: int) -> Any:
    return rope(self, (layer + 1) % self.num_hidden_layers)


def _head_dim_scale(build: Any, self: Any, *args: Any, **options: Any) -> None:
    build(self, *args, **options | {"scale": None})


def _cap_over_mask(attend: Any, np_: Any, q: Any, k: Any, v: Any, visible: Any, *, scale: float, softcap: float) -> Any:
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    scores = np_.einsum("btkgh,bskh->bkgts", grouped, k) * scale
    scores = np_.where(visible[:, None, None], scores, 0 * scores - 1e9)
    weights = np_.exp(np_.tanh(scores / softcap) * softcap)
    weights = weights / np_.sum(weights, -1)[..., None]
    return np_.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


def _exact(functions: Any) -> Callable[..., Any]:
    gelu = functions.gelu
    return lambda x, approximate: gelu(x, approximate="none" if isinstance(approximate, str) else False)


def _norm_after_sum(original: Any, backend: str) -> Any:
    def call(self: Any, x: Any, step: Any, cache: Any = None) -> Any:
        found = self.self_attn(self.input_layernorm(x), step, cache)
        attended, cache = found if isinstance(found, tuple) else (found, None)
        x = self.post_attention_layernorm(x + attended)
        x = self.post_feedforward_layernorm(x + self.mlp(self.pre_feedforward_layernorm(x)))
        return x if backend == "torch" else (x, cache)

    return subclassed(original, backend, call)


def _of(name: str, plant: Callable[[], Any], says: str, subject: Subject = GEMMA, **more: Any) -> Mutant:
    return of("gemma", name, "issue gemma", plant, says, subject, **more)


GEMMA_MUTANTS: list[Mutant] = [
    _of("embed_scale_missing", _tapped(_unscaled), "embeddings without √D", backends=BOTH),
    _of(
        "embed_scale_unrounded",
        _tapped(_unrounded),
        "√D in float32 for bfloat16",
        GEMMA_HALF,
        detector=rounding,
        backends=BOTH,
    ),
    _of(
        "ropes_exchanged",
        wrapped(f"{_CONFIG}.rope", _exchanged_ropes),
        "sliding layers turn as global ones do",
        backends=BOTH,
    ),
    _of(
        "gemma_window_plus_one",
        wrapped(f"{_CONFIG}.window", lambda window, self, i: (n := window(self, i)) and n + 1),
        "sliding window one key too wide",
        backends=BOTH,
    ),
    _of(
        "gemma_window_minus_one",
        wrapped(f"{_CONFIG}.window", lambda window, self, i: (n := window(self, i)) and n - 1),
        "sliding window without the query itself",
    ),
    _of(
        "query_scalar_ignored",
        wrapped("layers.attention:Attention.__init__", _head_dim_scale),
        "scores over √head_dim, not √query_pre_attn_scalar",
        backends=BOTH,
    ),
    _of("final_cap_missing", _config(final_logit_softcapping=None), "logits not capped", GEMMA_CAPPED, backends=BOTH),
    _of("score_cap_missing", _config(attn_logit_softcapping=None), "scores not capped", GEMMA_CAPPED, backends=BOTH),
    _of(
        "score_cap_over_mask",
        at_backend("layers.attention:attend", _cap_over_mask),
        "scores capped after the mask",
        GEMMA_CAPPED,
    ),
    _of(
        "rope_factor_ignored",
        wrapped(
            f"{_CONFIG}.rope",
            lambda rope, self, i: dataclasses.replace(rope(self, i), rope_type="default", factor=None),
        ),
        "linear scaling of global layers ignored",
        GEMMA_CAPPED,
    ),
    _of(
        "gelu_exact",
        framework("layers.mlp", "F", lambda np_, f: {"gelu": _exact(f)}),
        "exact gelu for its tanh form",
        backends=BOTH,
    ),
    _of(
        "norm_after_the_sum",
        lambda: [Patch("gemma3:DecoderLayer", _norm_after_sum)],
        "a branch's norm after the residual",
        backends=BOTH,
    ),
    _of(
        "feedforward_norms_swapped",
        exchanged("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        "norms before and after the MLP swapped",
        backends=BOTH,
    ),
]
