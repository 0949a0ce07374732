"""Where two backends part: the first tensor that fails, and whether its error began there or was handed down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_low

import numpy as np

from parity.comparison.case import Case
from parity.comparison.findings import Divergence, TensorRow, TokenError
from parity.ruler import STEP, Side, relative

Errors = dict[Side | None, float]  # of a, of b, and under None the distance of the two


def first_divergence(case: Case, rows: Sequence[TensorRow]) -> Divergence | None:
    """Describe the first failing tensor in order of execution; None when nothing fails.

    Errors of independent roundings add in quadrature, and a correct layer multiplies what it is handed by about what
    the other layers do. So the part of an error that the usual growth does not explain is taken to be local. Exact
    copies have error 0; growth from there is counted from one rounding.
    """
    index = next((i for i, row in enumerate(rows) if row.verdict == "FAIL"), None)
    if index is None:
        return None
    row, token = rows[index], rows[index].worst_token
    side = _worse_side(row)
    by_tensor = [_errors(case, other, token if row.by_token else None) for other in rows]
    errors = [found[side] for found in by_tensor]
    before, after = errors[index - 1] if index else 0.0, errors[index]
    growths = [_growth(errors, i, case.limits.u) for i in range(index + 1)]
    usual = [_usual_growth(case, rows, by_tensor, side, i) for i in range(index + 1)]
    # What fails may have been handed down: the step to look at is the one that stands out most on the way here.
    step = max(range(index + 1), key=lambda i: growths[i] / usual[i])
    stands_out = growths[step] > STEP * usual[step]
    inherited = min(after, before * usual[index])
    return Divergence(
        tensor=row.name,
        layer=row.layer,
        side=side,
        row=token.row if token else 0,
        position=token.position if token else 0,
        before=before,
        after=after,
        growth=growths[index],
        usual_growth=usual[index],
        inherited=inherited,
        local=math.inf if math.isinf(after) else math.sqrt(after**2 - inherited**2),
        suspect=rows[step].name if stands_out else None,
        module=row.module,
        suspect_module=rows[step].module if stands_out else None,
    )


def _worse_side(row: TensorRow) -> Side | None:
    if row.e_a is None or row.e_b is None:
        return None
    if row.blame in ("a", "b"):
        return row.blame
    return "a" if row.e_a >= row.e_b else "b"


def _errors(case: Case, row: TensorRow, token: TokenError | None) -> Errors:
    """Errors of one tensor or, where one token tells more, of that token; the distance where no oracle has it."""
    e_a, e_b, direct = row.e_a, row.e_b, row.direct
    if token is not None and token.position < case.a.tensors[row.name].shape[1]:
        place = (row.name, token.row, token.position)
        direct = _distance(case.a.tensors, case.b.tensors, place)
        if case.oracle_a is not None and case.oracle_b is not None and case.has_oracle(row.name):
            e_a = _distance(case.a.tensors, case.oracle_a.tensors, place)
            e_b = _distance(case.b.tensors, case.oracle_b.tensors, place)
    return {"a": direct if e_a is None else e_a, "b": direct if e_b is None else e_b, None: direct}


def _distance(own: dict[str, np.ndarray], other: dict[str, np.ndarray], place: tuple[str, int, int]) -> float:
    name, row, position = place
    x, r = (tensors[name][row, position].astype(np.float64) for tensors in (own, other))
    error = float(np.square(x - r).sum()) if np.isfinite(x).all() and np.isfinite(r).all() else math.inf
    return error if math.isinf(error) else relative(error, float(np.square(r).sum()))


def _growth(errors: Sequence[float], index: int, u: float) -> float:
    """The error after a step over the one before; a step from exact copies is counted from one rounding."""
    before = errors[index - 1] if index else 0.0
    return 1.0 if math.isinf(before) else errors[index] / max(before, u)


def _usual_growth(
    case: Case, rows: Sequence[TensorRow], by_tensor: Sequence[Errors], side: Side | None, index: int
) -> float:
    """What a correct step would have done here: the healthy side's growth, or the median over the other layers.

    The larger of the two, and at least 1, since errors do not heal. The median is the low one of both sides, since a
    bug may grow several layers, and leaves out first steps from exact copies, which are no growth but a start.
    """
    u = case.limits.u
    sides: list[Side | None] = ["a", "b"] if side else [None]
    others = []
    for one in sides:
        errors = [found[one] for found in by_tensor]
        grown = [i for i in range(1, len(rows)) if i != index and rows[i].layer is not None and errors[i - 1] > u]
        others += [_growth(errors, i, u) for i in grown if math.isfinite(errors[i])]
    healthy = [found["b" if side == "a" else "a"] for found in by_tensor] if side else []
    expected = [1.0, median_low(others)] if others else [1.0]
    if healthy and all(row.blame != "both" for row in rows) and math.isfinite(healthy[index]):
        expected.append(_growth(healthy, index, u))
    elif index == 0 or by_tensor[index - 1][side] <= u:
        expected.append(case.limits.c)  # a start with nobody to hold it against: what the lid allows after one layer
    return max(expected)
