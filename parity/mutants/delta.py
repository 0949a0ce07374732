"""Mutants of gated delta nets: the rule and its two forms, convolution, gates, state, padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from parity.mutants import Mutant, Patch
from parity.mutants.bench import decode
from parity.mutants.detectors import holes
from parity.mutants.life import life
from parity.mutants.life_list import any_version
from parity.mutants.plants import (
    BOTH,
    HYBRID,
    at_backend,
    bfloat16,
    each,
    framework,
    of,
    rms,
    wrapped,
    xp,
)

_NET = "layers.gated_delta"
_CONV = f"{_NET}:CausalConv1d.CALL"
_CHUNK = 64
_KEYS = 28  # width of all keys in the zoo, and of all queries
Rule = Callable[..., tuple[Any, Any]]  # of q, k, v, decay, beta, state


def _rules(change: Callable[..., tuple[Any, Any]], *forms: str) -> Callable[[], list[Patch]]:
    """``change(array module, rule, q, k, v, decay, beta, state)`` stands in for the delta rule, or one form of it."""

    def make(original: Rule, backend: str) -> Rule:
        return lambda *parts: change(xp(backend), original, *parts)

    return lambda: [Patch(f"{_NET}:{form}_delta_rule", make) for form in forms or ("recurrent", "chunked")]


def _between_chunks(carry: Callable[..., Any], overlap: int = 0) -> Callable[[], list[Patch]]:
    """Chunk by chunk; ``carry(array module, state before, state after, decay)`` is what the next one starts from."""

    def change(np_: Any, rule: Rule, *parts: Any) -> tuple[Any, Any]:
        *inputs, state = parts
        outs = []
        for first in range(0, inputs[0].shape[1], _CHUNK):
            start = max(0, first - overlap)
            piece = [x[:, start : first + _CHUNK] for x in inputs]
            out, after = rule(*piece, state)
            outs.append(out[:, first - start :])
            state = carry(np_, state, after, piece[3])
        return np_.concatenate(outs, 1), state

    return _rules(change, "chunked")


def _unfaded(np_: Any, before: Any, after: Any, decay: Any) -> Any:
    return after + before * (1 - np_.exp(np_.sum(decay, 1)))[..., None, None]


def _handed_rounded(np_: Any, before: Any, after: Any, decay: Any) -> Any:
    return after + (bfloat16(before) - before) * np_.exp(np_.sum(decay, 1))[..., None, None]


def _kept(name: str, change: Callable[[Any, Any, Any], Any]) -> Callable[[], list[Patch]]:
    """``change(array module, before, after)`` is what the cache holds under ``name`` after a run."""

    def make(original: Any, backend: str) -> Any:
        def call(self: Any, x: Any, step: Any, cache: Any = None) -> Any:
            if cache is None or step.keep_history:
                return original(self, x, step, cache)
            before = cache[name].clone() if backend == "torch" else cache[name]
            if backend == "torch":
                out = original(self, x, step, cache)
                cache[name].copy_(change(xp(backend), before, cache[name].clone()))
                return out
            out, kept = original(self, x, step, cache)
            return out, kept | {name: change(xp(backend), before, kept[name])}

        return call

    return lambda: [Patch(f"{_NET}:GatedDeltaNet.CALL", make)]


def _before_the_token(np_: Any, rule: Rule, q: Any, *rest: Any) -> tuple[Any, Any]:
    _, states = rule(q, *rest)
    before = np_.concatenate([rest[-1][:, None], states[:, :-1]], 1)
    return np_.einsum("btjp,btjpy->btjy", q, before), states


def _only_adds(np_: Any, rule: Rule, q: Any, k: Any, v: Any, decay: Any, beta: Any, state: Any) -> tuple[Any, Any]:
    """Linear attention that forgets by its gate but adds where the delta rule corrects."""
    outs = []
    for t in range(q.shape[1]):
        written = k[:, t, :, :, None] * (v[:, t] * beta[:, t, :, None])[:, :, None]
        state = state * np_.exp(decay[:, t])[..., None, None] + written
        outs.append(np_.einsum("bjp,bjpy->bjy", q[:, t], state))
    return np_.stack(outs, 1), state


def _raw_beta(np_: Any, rule: Rule, q: Any, k: Any, v: Any, decay: Any, beta: Any, state: Any) -> tuple[Any, Any]:
    safe = np_.clip(beta, 1e-6, 1 - 1e-6)
    return rule(q, k, v, decay, np_.where(beta > 0, np_.log(safe / (1 - safe)), beta), state)


def _plain_rate(np_: Any, w: Any) -> Any:
    return np_.log(np_.clip(w, 1e-9, 1e9))


def _rounded_state(np_: Any, rule: Rule, *parts: Any) -> tuple[Any, Any]:
    out, states = rule(*parts)
    return out, bfloat16(states)


def _fading(np_: Any, rule: Rule, q: Any, k: Any, v: Any, decay: Any, beta: Any, state: Any) -> tuple[Any, Any]:
    return rule(q, k, v, np_.where(beta == 0, decay - 1, decay), beta, state)


def _writing(np_: Any, rule: Rule, q: Any, k: Any, v: Any, decay: Any, beta: Any, state: Any) -> tuple[Any, Any]:
    return rule(q, k, v, decay, np_.where(beta == 0, beta + 0.5, beta), state)


def _split_as_kqv(np_: Any, w: Any) -> Any:
    return np_.concatenate([w[_KEYS : 2 * _KEYS], w[:_KEYS], w[2 * _KEYS :]], 0)


def _no_mask(original: Any, np_: Any, self: Any, x: Any, step: Any, cache: Any = None) -> Any:
    return original(self, x, dataclasses.replace(step, mask_BT=np_.ones_like(step.mask_BT)), cache)


def _spread(change: Callable[..., Any]) -> Callable[[], list[Patch]]:
    return at_backend(f"{_NET}:GatedDeltaNet._spread", change)


def _unnormed(spread: Any, np_: Any, self: Any, x: Any) -> Any:
    return np_.stack([x] * (self.num_value_heads // self.num_key_heads), 3).reshape(*x.shape[:2], -1, x.shape[3])


def _eps_outside(spread: Any, np_: Any, self: Any, x: Any) -> Any:
    length = np_.sqrt(np_.sum(x * x, -1))[..., None]
    return _unnormed(spread, np_, self, x / (length + 1e-6))


def _tiled(spread: Any, np_: Any, self: Any, x: Any) -> Any:
    found = spread(self, x)
    order = np_.arange(found.shape[2]).reshape(self.num_key_heads, -1).T.reshape(-1)
    return found[:, :, order]


def _gate_first(norm: Any, np_: Any, self: Any, x: Any, gate: Any) -> Any:
    swished = x * gate / (1 + np_.exp(-gate))
    return self.weight[...] * rms(np_, swished, self.eps)


def _of(name: str, plant: Callable[[], Any], says: str, subject: Any = HYBRID, **more: Any) -> Mutant:
    more = {"source": "issue hybrid"} | more
    return of("hybrid", name, more.pop("source"), plant, says, subject, **more)


DELTA_MUTANTS: list[Mutant] = [
    _of(
        "gated_norm_plus_one",
        each("linear_attn.norm", lambda np_, w: w + 1),
        "the gated norm with 1 + w",
        backends=BOTH,
    ),
    _of(
        "gate_before_norm",
        at_backend("layers.norm:RMSNormGated.CALL", _gate_first),
        "gate first, then norm",
        backends=BOTH,
    ),
    _of(
        "gated_norm_sigmoid",
        framework("layers.norm", "F", lambda np_, f: {"silu": f.sigmoid}),
        "sigmoid for silu in the gated norm",
    ),
    _of("dt_bias_dropped", each("dt_bias", lambda np_, w: 0 * w), "dt_bias ignored", backends=BOTH),
    _of("a_log_as_rate", each("A_log", _plain_rate), "A_log read as A", backends=BOTH),
    _of(
        "decay_grows",
        _rules(lambda np_, rule, q, k, v, decay, *rest: rule(q, k, v, -decay, *rest)),
        "exp(A_log) without its minus: the state grows",
        backends=BOTH,
    ),
    _of(
        "relu_for_softplus",
        framework(_NET, "F", lambda np_, f: {"softplus": f.relu}),
        "relu for softplus",
        backends=BOTH,
    ),
    _of("beta_without_sigmoid", _rules(_raw_beta), "beta without its sigmoid"),
    _of(
        "conv_late",
        at_backend(_CONV, lambda conv, np_, self, x, n: conv(self, np_.roll(x, 1, 1), n)),
        "the convolution one token late",
        backends=BOTH,
    ),
    _of(
        "conv_sees_next",
        at_backend(_CONV, lambda conv, np_, self, x, n: conv(self, np_.roll(x, -1, 1), n)),
        "the convolution sees the next token",
    ),
    _of(
        "conv_reversed",
        each("conv1d", lambda np_, w: np_.flip(w, (-1,))),
        "taps of the convolution reversed",
        backends=BOTH,
    ),
    _of(
        "conv_without_silu", framework(_NET, "F", lambda np_, f: {"silu": lambda x: x}), "no silu after the convolution"
    ),
    _of(
        "conv_state_stale",
        _kept("conv", lambda np_, before, after: before),
        "the convolution forgets decoded tokens",
        detector=decode,
    ),
    _of(
        "conv_state_short",
        _kept("conv", lambda np_, before, after: np_.roll(after, 1, 1)),
        "the convolution's past one slot off",
        detector=decode,
    ),
    _of(
        "state_not_kept",
        _kept("state", lambda np_, before, after: before),
        "the state of before the run is kept",
        detector=decode,
        backends=BOTH,
    ),
    _of("qkv_order", each("in_proj_qkv", _split_as_kqv), "k before q in in_proj_qkv", backends=BOTH),
    _of("l2norm_missing", _spread(_unnormed), "q and k of linear attention not normed", backends=BOTH),
    _of(
        "l2norm_eps_of_config",
        lambda: [Patch(f"{_NET}:L2_EPS", lambda original, backend: 3e-4)],
        "rms_norm_eps in the l2 norm",
    ),
    _of(
        "l2norm_eps_too_large",
        lambda: [Patch(f"{_NET}:L2_EPS", lambda original, backend: 1e-5)],
        "eps 1e-5 for 1e-6 in the l2 norm; keys that are small show it",
        source="planted",
    ),
    _of(
        "l2norm_eps_outside",
        _spread(_eps_outside),
        "eps outside the root of the l2 norm",
    ),
    _of(
        "query_scale_missing",
        _rules(lambda np_, rule, q, *rest: rule(q * 14**0.5, *rest)),
        "queries of linear attention without 1 / √P",
        backends=BOTH,
    ),
    _of("key_heads_tiled", _spread(_tiled), "key heads tiled over value heads, not repeated", backends=BOTH),
    _of("state_in_bfloat16", _rules(_rounded_state), "the state in bfloat16", detector=decode, backends=BOTH),
    _of(
        "chunks_start_anew",
        _between_chunks(lambda np_, before, after, decay: 0 * after),
        "every chunk starts from nothing",
        backends=BOTH,
    ),
    _of(
        "chunk_does_not_fade", _between_chunks(_unfaded), "a chunk adds to the state without fading it", detector=decode
    ),
    _of(
        "chunk_rounds_what_it_is_handed",
        _between_chunks(_handed_rounded),
        "the state in bfloat16 as a chunk fades it: of what the first one leaves, the third sees it",
        source="planted",
        detector=decode,
    ),
    _of(
        "chunks_overlap",
        _between_chunks(lambda np_, before, after, decay: after, overlap=1),
        "chunks share the token at their border",
        backends=BOTH,
    ),
    _of(
        "recurrent_reads_first",
        _rules(_before_the_token, "recurrent"),
        "decoding reads the state before it writes it",
        detector=decode,
        backends=BOTH,
    ),
    _of("delta_rule_only_adds", _rules(_only_adds, "chunked"), "what a key holds is added to, not corrected"),
    _of(
        "padding_enters_state",
        at_backend(f"{_NET}:GatedDeltaNet.CALL", _no_mask),
        "padding writes to the state",
        backends=BOTH,
    ),
    _of("padding_fades", _rules(_fading), "padding decays the state", detector=holes),
    _of("padding_learns", _rules(_writing), "padding has a beta", detector=holes),
    _of(
        "padding_fades_at_the_ends",
        _rules(_fading),
        "padding decays the state, but stands at the ends of rows alone",
        equivalent="before the first real token the state is zero, and after the last nothing reads it",
    ),
    _of(
        "stale_state_taken",
        wrapped("decoding:Decoding.decode", any_version),
        "the state of old weights is taken",
        detector=life,
        backends=BOTH,
    ),
]
