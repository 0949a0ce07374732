"""Mutants of loading: weights that end up in the wrong place, or changed."""

from __future__ import annotations

import dataclasses
from typing import Any

from parity.mutants import Mutant, Patch
from parity.mutants.bench import loaded_bits
from parity.mutants.plants import (
    BOTH,
    DEEP,
    HALF,
    MOE,
    SQUARE,
    each,
    of,
    weights,
)


def _as_text(found: dict[str, Any], np_: Any) -> dict[str, Any]:
    """Layers in the order in which their numbers sort as text."""
    layers = {name.split(".")[2] for name in found if name.startswith("model.layers.")}
    order = dict(zip(sorted(layers, key=int), sorted(layers), strict=True))
    names = {name: name.split(".") for name in found if name.startswith("model.layers.")}
    return {name: found[".".join([*parts[:2], order[parts[2]], *parts[3:]])] for name, parts in names.items()}


def _expert_missing(np_: Any, w: Any) -> Any:
    return np_.concatenate([w[:2], 0 * w[2:3], w[3:]], 0)


def _shards_swapped(original: Any, backend: str) -> Any:
    turn = {0: 1, 1: 0, None: None}
    return tuple(dataclasses.replace(rule, shard_id=turn[rule.shard_id]) for rule in original)


def _through_float16(found: dict[str, Any], np_: Any) -> dict[str, Any]:
    to = (lambda w, dtype: w.to(dtype)) if np_.__name__ == "torch" else (lambda w, dtype: w.astype(dtype))
    return {name: to(to(w, np_.float16), np_.bfloat16) for name, w in found.items()}


LOADING: list[Mutant] = [
    of(
        "loader",
        "layers_loaded_as_text",
        "parity 30",
        weights(_as_text),
        "layers placed in text order: 10 before 2",
        DEEP,
        detector=loaded_bits,
        backends=BOTH,
    ),
    of(
        "loader",
        "transpose_missed",
        "parity 36",
        each("o_proj", lambda np_, w: w.T),
        "a square weight loaded transposed",
        SQUARE,
        backends=BOTH,
    ),
    of(
        "loader",
        "gate_up_shards_swapped",
        "parity 22",
        lambda: [Patch("loaders.qwen3:RULES", _shards_swapped)],
        "shard ids of gate and up swapped in the rule table",
        MOE,
        backends=BOTH,
    ),
    of(
        "loader",
        "expert_not_loaded",
        "parity 29",
        each("experts.gate_up", _expert_missing),
        "one expert is not loaded",
        MOE,
        detector=loaded_bits,
        backends=BOTH,
    ),
    of(
        "loader",
        "expert_not_loaded_seen_in_logits",
        "parity 29",
        each("experts.gate_up", _expert_missing),
        "one expert is not loaded",
        MOE,
    ),
    of(
        "loader",
        "through_float16",
        "parity 42",
        weights(_through_float16),
        "bfloat16 weights pass through float16",
        HALF,
        detector=loaded_bits,
        backends=BOTH,
    ),
]
