"""Tokens: who picks which, counted only where rounding cannot decide it.

A token is decidable when the reference's margin between its two best logits is above twice the largest error of the
side that shows less of it: no rounding of that size can turn it, and what the other side is off beyond that is no
rounding, so it excuses neither. There 100 % agreement is owed; elsewhere, and at a token that the oracle says rounding
alone may turn around, a difference is a tie and proves nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from parity.comparison.case import Case, chunks
from parity.comparison.findings import Generated, Top1
from parity.comparison.router_flips import Flips, Router
from parity.ruler import Side

LOGITS = "logits"
# The worst first: what a reader has to know before the rest.
OUTCOMES = ("differs", "undecided", "router flip", "tie", "equal")


@dataclass(frozen=True, slots=True)
class Picks:
    """Top-1 of one side and of its reference by token [n], the reference's margin, and the largest error [scalar].

    The margin is 0 where rounding alone may turn a token around.
    """

    own: np.ndarray
    reference: np.ndarray
    margin: np.ndarray
    error: float


def picks(case: Case, keep: np.ndarray) -> tuple[Picks, ...]:
    """Picks of a and of b; without an oracle those of a alone, with b for its reference and the lid for its error."""
    own: list[list[np.ndarray]] = [[], []]
    best: list[list[np.ndarray]] = [[], []]
    margins: list[list[np.ndarray]] = [[], []]
    errors, largest = [0.0, 0.0], [0.0, 0.0]
    may_turn = case.limits.may_turn(case.amplification(LOGITS)[keep[case.mask()]])
    for where, (a, b, *oracles) in chunks(case, LOGITS, keep):
        pairs = zip((a, b), oracles, strict=True) if oracles else [(a, b)]
        for side, (mine, reference) in enumerate(pairs):
            own[side].append(mine.argmax(axis=1))
            best[side].append(reference.argmax(axis=1))
            margins[side].append(np.where(may_turn[where], 0.0, _margin(reference)))
            errors[side] = max(errors[side], float(np.abs(mine - reference).max()))
            largest[side] = max(largest[side], float(np.abs(reference).max()))
    if not own[0]:
        return ()
    sides = [0, 1] if own[1] else [0]
    if len(sides) == 1:
        errors[0] = 2 * case.limits.lid(case.num_layers) * largest[0]
    floors = [case.limits.u * value for value in largest]
    return tuple(
        Picks(*(np.concatenate(parts[i]) for parts in (own, best, margins)), error=max(errors[i], floors[i]))
        for i in sides
    )


def _margin(logits_NV: np.ndarray) -> np.ndarray:
    """Best minus second best; a vocabulary of one has nothing to confuse."""
    if logits_NV.shape[1] < 2:
        return np.full(len(logits_NV), np.inf)
    top = np.partition(logits_NV, -2, axis=1)
    return top[:, -1] - top[:, -2]


def count_top1(found: tuple[Picks, ...], keep: np.ndarray) -> tuple[Top1, ...]:
    """Hold each side's picks against its reference's, with the error of the better side for a bound of both.

    So an innocent side is judged by its own error, and a guilty one by what rounding is seen to do.
    """
    places = np.argwhere(keep)
    bound = min((one.error for one in found), default=0.0)
    out = []
    for index, one in enumerate(found):
        decidable = one.margin > 2 * bound
        same = one.own == one.reference
        missed = places[decidable & ~same]
        side: Side = ("a", "b")[index] if len(found) == 2 else "both"
        out.append(
            Top1(
                side=side,
                tokens=len(same),
                bound=bound,
                decidable=int(decidable.sum()),
                agree=int((decidable & same).sum()),
                ties=int((~decidable).sum()),
                ties_agree=int((~decidable & same).sum()),
                first_miss=(int(missed[0][0]), int(missed[0][1])) if len(missed) else None,
            )
        )
    return tuple(out)


def compare_generated(case: Case, found: tuple[Picks, ...], keep: np.ndarray, router: Router) -> Generated | None:
    """Compare the generated tokens row by row up to the first difference; None when not both traces have any.

    Of two that were to have different numbers of them, as many as both; where only one goes on after the end, none.
    """
    both = case.a, case.b
    if any("generated_ids" not in trace.tensors for trace in both):
        return None
    asked = [trace.meta for trace in both if "max_new_tokens" in trace.meta]
    if len({meta.get("ignore_eos") for meta in asked}) > 1:
        return None
    most = min(meta["max_new_tokens"] for meta in asked) if len(asked) == 2 else None
    ids = [trace.tensors["generated_ids"].astype(np.int64)[:, :most] for trace in both]
    steps = max(array.shape[1] for array in ids)
    # A row that stopped early differs from one that went on at the step where it stopped.
    padded = [np.pad(array, ((0, 0), (0, steps - array.shape[1])), constant_values=-1) for array in ids]
    outcomes: list[tuple[str, int, int]] = []
    for row in range(len(ids[0])):
        different = np.flatnonzero(padded[0][row] != padded[1][row])
        if case.mask()[row].any() and len(different):
            step = int(different[0])
            outcomes.append((_outcome(case, found, keep, router.between, row, step), row, step))
        else:
            outcomes.append(("equal", row, -1))
    outcome, row, step = min(outcomes, key=lambda item: OUTCOMES.index(item[0]))
    counts = dict(Counter(name for name, _, _ in outcomes))
    blame = _blame(case, padded, row, step) if outcome == "differs" else None
    return Generated(len(outcomes), steps, counts, outcome, None if outcome == "equal" else (row, step), blame)


def _outcome(case: Case, found: tuple[Picks, ...], keep: np.ndarray, between: Flips | None, row: int, step: int) -> str:
    """What a first difference at one step of one row is."""
    if between is not None and any(flips[row].any() for flips in between.sets.values()):
        return "router flip"
    margin = _margin_at(case, found, keep, row, step)
    # The routing of generated tokens is not recorded, so past the first step a sparse model may have flipped unseen.
    if margin is None or not found or (between is not None and step > 0):
        return "undecided"
    return "tie" if margin <= 2 * max(one.error for one in found) else "differs"


def _margin_at(case: Case, found: tuple[Picks, ...], keep: np.ndarray, row: int, step: int) -> float | None:
    """The reference's margin at a generated step: from its logits for the first, from what was recorded for others."""
    for trace in (case.oracle_a, case.oracle_b, case.a, case.b):
        recorded = trace.tensors.get("generated_margins") if trace else None
        if recorded is not None and recorded.shape[1] > step:
            return float(recorded[row, step])
    last = int(np.flatnonzero(case.mask()[row])[-1])
    if step > 0 or not found or not keep[row, last]:
        return None
    index = int(keep[:row].sum() + keep[row, :last].sum())
    return float(found[0].margin[index])


def _blame(case: Case, ids: list[np.ndarray], row: int, step: int) -> Side | None:
    """The side that leaves the oracle's own tokens, where it has some and came as far on the same path."""
    if case.oracle_a is None or "generated_ids" not in case.oracle_a.tensors:
        return None
    oracle = case.oracle_a.tensors["generated_ids"][row]
    if len(oracle) <= step or (oracle[:step] != ids[0][row, :step]).any():
        return None
    same = [bool(array[row, step] == oracle[step]) for array in ids]
    return None if same[0] == same[1] else "b" if same[0] else "a"
