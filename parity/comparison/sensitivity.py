"""What a comparison could have seen: its own errors held against faults of one percent that the oracle tried.

Two ways to see a fault. The ruler sees what makes an error too large. And a weight that is too large by some factor
moves every token in a direction the oracle has measured, while rounding points anywhere: averaged over all tokens, what
an error has in that direction is the factor, known to a hundredth of a percent where the ruler sees but whole percents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from parity import trace_layout
from parity.comparison.case import Case, chunks
from parity.comparison.findings import Probe, TensorRow
from parity.comparison.router_flips import Router
from parity.ruler import (
    FACTOR,
    FACTOR_DEVIATIONS,
    FACTOR_DIFFERENT,
    FACTOR_TOKENS,
    SEEN_DEVIATIONS,
    Cause,
    Limits,
    Side,
)
from parity.trace import Trace


def study_probes(case: Case, rows: list[TensorRow], router: Router) -> tuple[Probe, ...]:
    """Hold both traces against every fault that the oracle tried; nothing where it tried none.

    Of traces that go on from what was handed in (``after`` in their metadata) only against faults behind that: what is
    wrong before it, or in the same layer, was replaced.
    """
    oracle = case.oracle_a
    if oracle is None or case.limits is None:
        return ()
    after = case.a.meta.get("after")
    first = -1 if after is None else trace_layout.order_of_module(str(after))
    by_name = {row.name: row for row in rows if row.basis == "oracle" and row.tokens and not row.nonfinite}
    return tuple(
        _studied(case, by_name, router, oracle, number, document)
        for number, document in enumerate(oracle.meta.get("probes") or [])
        if trace_layout.order_of(str(document["tensor"])) > first
    )


def _studied(
    case: Case,
    rows: Mapping[str, TensorRow],
    router: Router,
    oracle: Trace,
    number: int,
    document: Mapping[str, Any],
) -> Probe:
    size, tensor = float(document["size"]), str(document["tensor"])
    factors = deviation = None
    if tensor in rows:
        response = oracle.tensors.get(f"{trace_layout.PROBE}{number}")
        factors, deviation = _factors(case, tensor, router.keep(case, tensor), response)
    by_size = _least_seen(case.limits, rows, document["moved"], size)
    by_factor = math.inf
    if deviation is not None:
        by_factor = max(FACTOR, FACTOR_DEVIATIONS * deviation) + SEEN_DEVIATIONS * deviation
    cause, blame = _judge(factors, deviation)
    return Probe(
        module=str(document["module"]),
        kind=document["kind"],
        size=size,
        tensor=tensor,
        factor_a=None if factors is None else factors[0],
        factor_b=None if factors is None else factors[1],
        deviation=deviation,
        least=min(by_factor, by_size),
        least_by_size=by_size,
        cause=cause,
        blame=blame,
    )


def _factors(
    case: Case, name: str, keep: np.ndarray, response_BTD: np.ndarray | None
) -> tuple[tuple[float, float], float]:
    """How much of a fault the errors of a and b hold, and the standard deviation of that.

    Least squares over tokens, each relative to its own size and weighted by how well it shows: rounding moves some a
    hundred times as far as others. What a layer was handed is taken out of its error first. The deviation is the
    sandwich estimate over tokens, each against what the others say, which takes no channel for independent of another,
    nor a token of one that is the same.
    """
    along, squares, sizes = [], [], []
    flat = None if response_BTD is None else response_BTD.reshape(keep.size, -1)[np.flatnonzero(keep)]
    for where, errors, reference in _errors(case, name, keep):
        scale = np.maximum(np.linalg.norm(reference, axis=1, keepdims=True), 1e-30)
        direction = reference / scale if flat is None else flat[where].astype(np.float64)
        along.append([np.einsum("nd,nd->n", error / scale, direction) for error in errors])
        squares.append(np.einsum("nd,nd->n", direction, direction))
        sizes.append(sum(np.einsum("nd,nd->n", error / scale, error / scale) for error in errors))
    alike, count = _alike(case, keep)
    copies = np.bincount(alike)
    if len(alike) < FACTOR_TOKENS or len(alike) ** 2 < FACTOR_DIFFERENT * float(np.square(copies).sum()):
        return (0.0, 0.0), math.inf
    c, q, size = np.concatenate(along, axis=1), np.concatenate(squares), np.concatenate(sizes)
    w = 1.0 / (size + np.median(size) + 1e-60)
    total = float((w * q).sum())
    if total == 0:
        return (0.0, 0.0), math.inf
    factors = [float((w * one).sum()) / total for one in c]
    others = 1 - np.minimum(np.bincount(alike, w * q, minlength=count) / total, 0.5)
    scores = [np.bincount(alike, w * (c[i] - factors[i] * q), minlength=count) / others for i in (0, 1)]
    spread = [math.sqrt(float(np.square(one).sum())) / total for one in scores]
    return (factors[0], factors[1]), max(spread)


def _alike(case: Case, keep: np.ndarray) -> tuple[np.ndarray, int]:
    """A number for every token that counts, the same where embeddings are the same, and how many there are.

    Rounding is no chance: what repeats a token, or a row, repeats its errors, and ten of one are one draw. Not told by
    ids, for the placeholders of a picture have one and are all different.
    """
    assert case.oracle_a is not None, "probes are the oracle's"
    tokens = np.flatnonzero(keep)
    first = case.oracle_a.tensors.get("hidden_states.0")
    if first is None or first.shape[:2] != keep.shape:
        return np.arange(len(tokens)), len(tokens)
    x_AD = np.ascontiguousarray(first.reshape(keep.size, -1)[tokens])
    found, alike = np.unique(x_AD.view(np.dtype((np.void, x_AD.itemsize * x_AD.shape[1]))), return_inverse=True)
    return alike.reshape(-1), len(found)


def _errors(case: Case, name: str, keep: np.ndarray) -> Iterator[tuple[slice, list[np.ndarray], np.ndarray]]:
    """(which tokens, errors of a and of b, the oracle) in float64; of a layer what its input did not bring along."""
    layer = trace_layout.layer_of(name)
    before = f"hidden_states.{layer - 1}" if layer else ""
    handed = chunks(case, before, keep) if before in case.names and case.has_oracle(before) else None
    for where, (a, b, oracle_a, oracle_b) in chunks(case, name, keep):
        errors = [a - oracle_a, b - oracle_b]
        if handed is not None:
            _, (a, b, oracle_a_before, oracle_b_before) = next(handed)
            errors = [errors[0] - (a - oracle_a_before), errors[1] - (b - oracle_b_before)]
        yield where, errors, oracle_a


def _least_seen(limits: Limits, rows: Mapping[str, TensorRow], moved: Mapping[str, float], size: float) -> float:
    """The smallest such fault, in either trace, that would have made some tensor's error too large for the ruler."""
    least = math.inf
    for name, row in rows.items():
        if not moved.get(name) or row.e_a is None or row.e_b is None:
            continue
        for own, other in ((row.e_a, row.e_b), (row.e_b, row.e_a)):
            limit = min(limits.k * max(other, limits.u), row.lid)
            least = min(least, size * math.sqrt(max(limit**2 - own**2, 0.0)) / moved[name])
    return least


def _judge(factors: tuple[float, float] | None, deviation: float | None) -> tuple[Cause | None, Side | None]:
    """Whose error holds more of a fault than chance puts there.

    Of one side alone only where it stands apart from the other, too: what both round in one way, at a key that all
    tokens attend to, is as far off in both, and no number of tokens makes that less.
    """
    if factors is None or deviation is None:
        return None, None
    limit = max(FACTOR, FACTOR_DEVIATIONS * deviation)
    is_over = [abs(factor) > limit for factor in factors]
    if all(is_over):
        return "both wrong", "both"
    if abs(factors[0] - factors[1]) <= limit:
        return None, None
    return ("bug", "a") if is_over[0] else ("peer is the outlier", "b") if is_over[1] else (None, None)
