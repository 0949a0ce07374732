"""One tensor under the ruler: as a whole, and token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from parity import ruler, trace_layout
from parity.comparison.case import Case, Sums, sums
from parity.comparison.findings import TensorRow, TokenError
from parity.ruler import Judgement, Side


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors of one tensor: of the whole over the tokens kept, and float64 [n] by token; inf where not finite.

    What rounding alone may turn around is left out of the whole, unless nothing else is there.
    e_a and e_b are not there without an oracle, direct is always.
    """

    whole: dict[str, float]
    by_token: dict[str, np.ndarray]
    amplification: np.ndarray  # of rounding by the oracle, by token; 0 where unknown
    overall: float  # the same of the whole


def judge_tensor(case: Case, name: str, keep: np.ndarray) -> tuple[TensorRow, np.ndarray]:
    """Judge one tensor that both traces have.

    ``keep``, shaped as ``case.mask(name)``, holds the unpadded tokens that no router flip reaches.

    Returns:
        The row, and float32 [B, T] with the share of its limit that each token used, NaN where not judged.
    """
    mask = case.mask(name)
    total = sums(case, name)
    kept = keep[mask]
    finite = total.finite_a & total.finite_b
    judged = kept | ~finite  # what is not finite fails, also behind a router flip
    errors = _errors(case, total, judged, case.amplification(name))
    used = _used_by_token(case, errors)
    picture = np.full(mask.shape, np.nan, np.float32)
    places = np.argwhere(mask)[judged]
    picture[tuple(places.T)] = np.where(np.isinf(used), used, np.minimum(used, np.finfo(np.float32).max))
    worst = _worst_token(name, errors, used, places)
    if not finite.all():
        first = int(np.argmax(~finite[judged]))
        worst = _token(name, errors, used, places, first)
        return _nonfinite(case, _row(case, name, errors, worst, len(used)), worst, total), picture
    return _row(case, name, errors, worst, len(used)), picture


def _errors(case: Case, total: Sums, judged: np.ndarray, amplification: np.ndarray) -> Errors:
    parts = {"direct": (total.diff, total.size, total.finite_a & total.finite_b)}
    for key, error, scale, finite in (
        ("e_a", total.error_a, total.scale_a, total.finite_a),
        ("e_b", total.error_b, total.scale_b, total.finite_b),
    ):
        if error is not None and scale is not None:
            parts[key] = (error, scale, finite)
    amplified = amplification[judged]
    counted = ~case.limits.may_turn(amplified)
    counted |= not counted.any()  # all of them: then together
    whole, by_token = {}, {}
    for key, (error, scale, finite) in parts.items():
        error, scale, finite = error[judged], scale[judged], finite[judged]
        # Where a is not finite, so is every sum with a in it; b's error stays what it is.
        safe_error, safe_scale = np.where(finite, error, 0.0), np.where(np.isfinite(scale), scale, 0.0)
        by_token[key] = np.where(finite, ruler.relative_by_token(safe_error, safe_scale), np.inf)
        error_sq, scale_sq = (float(array[counted].sum()) for array in (safe_error, safe_scale))
        whole[key] = ruler.relative(error_sq, scale_sq) if finite.all() else math.inf
    scale = total.size[judged][counted]
    scale = np.where(np.isfinite(scale), scale, 0.0)
    overall = ruler.relative(float((amplified[counted] ** 2 * scale).sum()), float(scale.sum()))
    return Errors(whole, by_token, amplified, overall)


def _used_by_token(case: Case, errors: Errors) -> np.ndarray:
    limits, amplified = case.limits, errors.amplification
    if "e_a" not in errors.by_token:
        return errors.by_token["direct"] / (2 * limits.token_lid(case.num_layers))
    lid = np.array([limits.token_lid(case.num_layers, float(value)) for value in amplified])
    e_a, e_b = errors.by_token["e_a"], errors.by_token["e_b"]
    return ruler.used_by_token(e_a, e_b, k=limits.k_token, lid=lid, u=limits.u, least=limits.layer * amplified)


def _worst_token(name: str, errors: Errors, used: np.ndarray, places: np.ndarray) -> TokenError | None:
    return _token(name, errors, used, places, int(np.argmax(used))) if used.size else None


def _token(name: str, errors: Errors, used: np.ndarray, places: np.ndarray, index: int) -> TokenError:
    values = {key: float(array[index]) for key, array in errors.by_token.items()}
    row, position = map(int, places[index])
    margin = 1 - float(used[index])
    amplified = float(errors.amplification[index])
    return TokenError(name, row, position, values.get("e_a"), values.get("e_b"), values["direct"], margin, amplified)


def _judge_whole(case: Case, errors: Errors) -> Judgement:
    limits, lid = case.limits, case.limits.lid(case.num_layers, errors.overall)
    if "e_a" not in errors.whole:
        return ruler.judge_direct(errors.whole["direct"], lid=lid)
    e_a, e_b = errors.whole["e_a"], errors.whole["e_b"]
    floor = max(limits.u, limits.layer * errors.overall)  # or a peer that was lucky at one token would fail us
    return ruler.judge(e_a, e_b, k=limits.k, lid=lid, floor_a=floor, floor_b=floor)


def _judge_token(case: Case, errors: Errors, token: TokenError) -> Judgement:
    limits, lid = case.limits, case.limits.token_lid(case.num_layers, token.amplification)
    if token.e_a is None or token.e_b is None:
        return ruler.judge_direct(token.direct, lid=lid)
    least = limits.layer * token.amplification
    floors = [max(ruler.token_floor(errors.by_token[key], limits.u), least) for key in ("e_a", "e_b")]
    return ruler.judge(token.e_a, token.e_b, k=limits.k_token, lid=lid, floor_a=floors[0], floor_b=floors[1])


def _row(case: Case, name: str, errors: Errors, worst: TokenError | None, tokens: int) -> TensorRow:
    whole = _judge_whole(case, errors)
    cause, blame = whole.cause, whole.blame
    if worst is not None:
        token = _judge_token(case, errors, worst)
        if cause is None or (cause == "rounding" and token.cause == "bug"):  # a token may say more than the mean
            cause, blame = token.cause, token.blame
    e_a, e_b = errors.whole.get("e_a"), errors.whole.get("e_b")
    return TensorRow(
        name=name,
        layer=trace_layout.layer_of(name),
        module=case.module_of(name),
        basis="direct" if e_a is None else "oracle",
        tokens=tokens,
        e_a=e_a,
        e_b=e_b,
        direct=errors.whole["direct"],
        ratio=None if e_a is None or e_b is None else ruler.ratio(e_a, e_b, case.limits.u),
        limit=whole.limit,
        lid=case.limits.lid(case.num_layers, errors.overall),
        margin=1 - whole.used,
        token_margin=worst.margin if worst else 1.0,
        verdict="SKIP" if not tokens else "FAIL" if cause else "PASS",
        cause=cause,
        blame=blame,
        worst_token=worst,
    )


def _nonfinite(case: Case, row: TensorRow, token: TokenError, total: Sums) -> TensorRow:
    """NaN or infinity is never rounding, whatever the peer does."""
    bad_a, bad_b = not total.finite_a.all(), not total.finite_b.all()
    blame: Side = "both" if bad_a and bad_b else "a" if bad_a else "b"
    values = [trace.tensors[row.name][token.row, token.position] for trace in (case.a, case.b)]
    label, value = next((label, v) for label, v in zip(case.labels, values, strict=True) if not np.isfinite(v).all())
    channel = int(np.argmax(~np.isfinite(value)))
    place = f"{value[channel]} in {label} at row {token.row}, position {token.position}, channel {channel}"
    return replace(row, verdict="FAIL", cause="bug", blame=blame, nonfinite=place, worst_token=token)
