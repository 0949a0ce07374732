"""Mutants of hybrid models besides their delta nets: norms that add one, gated attention, axes, the shared expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loaders import CheckpointError
from parity.mutants import Mutant, Patch
from parity.mutants.detectors import axes, rounding
from parity.mutants.life import life
from parity.mutants.moe import not_normed
from parity.mutants.plants import (
    BOTH,
    HYBRID,
    HYBRID_HALF,
    HYBRID_MOE,
    WIDE,
    at_backend,
    bfloat16,
    each,
    framework,
    of,
    rms,
    weights,
    wrapped,
)

_GEMMA = "layers.norm:GemmaRMSNorm"
_CONFIG = "loaders.qwen3_5:Qwen3_5Config"


def _halves(np_: Any, w: Any) -> Any:
    """What reading all queries, then all gates, amounts to: the rows of [N, 2, H] as [2, N, H]."""
    return np_.swapaxes(w.reshape(2, 6, 16, -1), 0, 1).reshape(w.shape)


def _gate_at_the_end() -> list[Patch]:
    gates: list[Any] = []

    def keep(np_: Any, functions: Any) -> dict[str, Any]:
        def sigmoid(x: Any) -> Any:
            gates.append(functions.sigmoid(x))
            return np_.ones_like(x)

        return {"sigmoid": sigmoid}

    def after(call: Any, self: Any, x: Any, step: Any, cache: Any = None) -> Any:
        found = call(self, x, step, cache)
        out, *more = found if isinstance(found, tuple) else (found,)
        out = out * gates.pop().reshape(out.shape)
        return (out, *more) if more else out

    gated = framework("layers.gated_attention", "torch", keep)()
    return [*gated, *wrapped("layers.gated_attention:GatedAttention.CALL", after)()]


def _zero_centred(change: Callable[[Any, Any], Any]) -> Callable[[], list[Patch]]:
    def edit(found: dict[str, Any], np_: Any) -> dict[str, Any]:
        names = [name for name in found if "norm" in name and "linear_attn" not in name]
        return {name: change(np_, found[name]) for name in names}

    return weights(edit)


def _rounded_sum(norm: Any, np_: Any, self: Any, x: Any) -> Any:
    return rms(np_, x, self.eps) * bfloat16(1.0 + self.weight[...])


def _cast_first(norm: Any, self: Any, x: Any) -> Any:
    import torch

    normed = rms(torch, x.float(), self.eps).to(x.dtype)
    return (normed.float() * (1.0 + self.weight.float())).to(x.dtype)


def _derived_once() -> list[Patch]:
    done: list[Any] = []

    def derive(original: Any, self: Any) -> None:
        if not any(norm is self for norm in done):
            done.append(self)
            original(self)

    return wrapped(f"{_GEMMA}.derive", derive)()


def _rebound(derive: Any, self: Any) -> None:
    self.gemma_weight = self.weight.float() + 1.0


def _last_first(rotate: Any, np_: Any, x: Any, cos: Any, sin: Any) -> Any:
    turned = 2 * cos.shape[-1]
    return np_.roll(rotate(np_.roll(x, turned, -1), cos, sin), -turned, -1)


def _in_blocks(axes: Any, np_: Any, *args: Any) -> Any:
    return np_.sort(axes(*args), stable=True)[0]


def _shifted_layers(original: Any, self: Any, layer: int) -> bool:
    return original(self, (layer + 1) % self.num_hidden_layers)


def _first_axis(rope: Any, parameters: Any, size: int, longest: int, positions: Any, length: Any) -> Any:
    return rope(parameters, size, longest, positions[0] if positions.ndim == 3 else positions, length)


def _of(name: str, plant: Callable[[], Any], says: str, subject: Any = HYBRID, **more: Any) -> Mutant:
    more = {"source": "issue hybrid"} | more
    return of("hybrid", name, more.pop("source"), plant, says, subject, **more)


HYBRID_MUTANTS: list[Mutant] = [
    _of("one_not_added", _zero_centred(lambda np_, w: w - 1), "norms without the 1 of 1 + w", backends=BOTH),
    _of(
        "one_added_in_bfloat16",
        at_backend(f"{_GEMMA}.CALL", _rounded_sum),
        "1 + w in bfloat16",
        HYBRID_HALF,
        backends=BOTH,
    ),
    _of(
        "norm_cast_before_gamma",
        wrapped(f"{_GEMMA}.CALL", _cast_first),
        "rounded before the product with 1 + w",
        HYBRID_HALF,
        detector=rounding,
    ),
    _of(
        "gemma_weight_stale",
        _derived_once,
        "1 + w is computed once and kept",
        detector=life,
        source="sglang 22673",
    ),
    _of(
        "gemma_weight_rebound",
        wrapped(f"{_GEMMA}.derive", _rebound),
        "1 + w moves with every update",
        detector=life,
        source="sglang 26430",
        refusal=RuntimeError,
    ),
    _of(
        "query_gate_halves", each(".q_proj.weight", _halves), "queries and gates as halves, not per head", backends=BOTH
    ),
    _of(
        "attention_gate_dropped",
        framework("layers.gated_attention", "torch", lambda np_, f: {"sigmoid": np_.ones_like}),
        "attention without its gate",
        backends=BOTH,
    ),
    _of(
        "attention_gate_silu",
        framework("layers.gated_attention", "torch", lambda np_, f: {"sigmoid": lambda x: x * f.sigmoid(x)}),
        "silu for sigmoid in attention's gate",
    ),
    _of("gate_after_o_proj", _gate_at_the_end, "attention's gate after o_proj", WIDE),
    _of(
        "rotary_everywhere",
        lambda: [Patch(f"{_CONFIG}.rotary_dim", lambda was, backend: property(lambda c: c.head_dim))],
        "all of a head turns, whatever partial_rotary_factor says",
        backends=BOTH,
    ),
    _of(
        "rotary_of_last",
        at_backend("layers.gated_attention:rotate", _last_first),
        "the last dimensions turn, not the first",
    ),
    _of(
        "axes_exchanged",
        at_backend("layers.rotary:_axes", lambda axes, np_, *args: (3 - axes(*args)) % 3),
        "height and width exchanged in the rotary embedding",
        detector=axes,
        backends=BOTH,
    ),
    _of(
        "axes_in_blocks",
        at_backend("layers.rotary:_axes", _in_blocks),
        "sections one after the other, not interleaved",
        detector=axes,
    ),
    _of("time_alone", wrapped("layers.step:rotary_embedding", _first_axis), "height and width ignored", detector=axes),
    _of(
        "shared_gate_dropped",
        framework("layers.shared_expert", "torch", lambda np_, f: {"sigmoid": np_.ones_like}),
        "the shared expert without its gate",
        HYBRID_MOE,
        backends=BOTH,
    ),
    _of(
        "shared_expert_dropped",
        framework("layers.shared_expert", "torch", lambda np_, f: {"sigmoid": lambda x: 0 * x}),
        "the shared expert is not heard",
        HYBRID_MOE,
    ),
    _of(
        "hybrid_top_k_not_normed",
        wrapped("layers.moe:TopKRouter.__init__", not_normed),
        "chosen weights do not sum to one",
        HYBRID_MOE,
    ),
    _of(
        "fused_gate_up_swapped",
        each("experts.gate_up", lambda np_, w: np_.flip(w, (1,))),
        "up before gate in fused experts",
        HYBRID_MOE,
        backends=BOTH,
    ),
    _of(
        "fused_experts_turned",
        each("experts.down", lambda np_, w: np_.roll(w, 1, 0)),
        "down_proj of the expert before",
        HYBRID_MOE,
        backends=BOTH,
    ),
    _of(
        "layer_pattern_shifted",
        wrapped(f"{_CONFIG}.has_linear_attention", _shifted_layers),
        "full and linear layers one off",
        refusal=CheckpointError,
        backends=BOTH,
    ),
]
