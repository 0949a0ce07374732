"""One step under the ruler: what it is off, given what it was handed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parity import ruler
from parity.bisection import Step
from parity.record_oracle import SHAKE
from parity.ruler import LIMITS, ROUTER_SHARE, Judgement, Limits

Values = Mapping[str, np.ndarray]
LOGITS = ".logits"  # behind a router's path: the scores its choice is made from


@dataclass(frozen=True, slots=True)
class Said:
    """What the oracle's steps make of a side's values, by path.

    Attributes:
        told: of the values as they are.
        shaken: of them with a relative error of ``SHAKE``.
        turned: of them as they are, with angles as far off as float32's.
    """

    told: Values
    shaken: Values
    turned: Values

    def amplification(self, path: str, limits: Limits, mask_BT: np.ndarray) -> float:
        """How much a step amplifies rounding, that of its angles among it."""
        moved, turned = (distance(values[path], self.told[path], mask_BT) for values in (self.shaken, self.turned))
        return max(moved / SHAKE, float(limits.amplification_of(np.asarray(turned))))


class Judge:
    """Holds steps against their limits.

    Args:
        dtype: what was computed in.
        mask_BT: tokens that count, bool [B, T].
    """

    def __init__(self, dtype: str, mask_BT: np.ndarray) -> None:
        if dtype not in LIMITS:
            raise ValueError(f"there is no ruler for {dtype}, expected one of {', '.join(LIMITS)}")
        self.limits, self.mask = LIMITS[dtype], mask_BT

    def step(
        self,
        path: str,
        found: tuple[Values, Values],
        crossed: Sequence[Values | None],
        said: Sequence[Said] | None,
    ) -> Step:
        """Judge one step.

        Args:
            path: of the step.
            found: what a and b computed.
            crossed: what a made of b's values, and b of a's; None: not asked.
            said: what the oracle made of a's values and of b's; None: there is none.
        """
        a, b = found[0][path], found[1][path]
        if a.dtype.kind != "f":
            return self._choice(path, a, b, crossed, said)
        fed = [
            None if run is None else distance(run[path], other, self.mask)
            for run, other in zip(crossed, (b, a), strict=True)
        ]
        free = distance(a, b, self.mask)
        if said is None:
            direct = max(one for one in fed if one is not None)
            judged = ruler.judge_direct(direct, lid=self.limits.lid(1))
            return Step(path, free, fed[0], fed[1], None, None, judged.limit, judged.used, _blame(judged))
        errors = [distance(value, one.told[path], self.mask) for value, one in zip((a, b), said, strict=True)]
        amplified = max(one.amplification(path, self.limits, self.mask) for one in said)
        floor = self.limits.layer * max(1.0, amplified)
        lid = self.limits.lid(1, amplified)
        judged = ruler.judge(errors[0], errors[1], k=self.limits.k, lid=lid, floor_a=floor, floor_b=floor)
        return Step(path, free, fed[0], fed[1], errors[0], errors[1], judged.limit, judged.used, _blame(judged))

    def _choice(
        self,
        path: str,
        a: np.ndarray,
        b: np.ndarray,
        crossed: Sequence[Values | None],
        said: Sequence[Said] | None,
    ) -> Step:
        """What a router chose. With an oracle an error is how much worse than its own choice, in its own scores."""
        fed = [
            None if run is None else _share(run[path], other, self.mask)
            for run, other in zip(crossed, (b, a), strict=True)
        ]
        free = _share(a, b, self.mask)
        if said is None:
            used = max(one for one in fed if one is not None) / ROUTER_SHARE
            return Step(path, free, fed[0], fed[1], None, None, ROUTER_SHARE, used, "unknown" if used > 1 else None)
        errors = [
            _shortfall(chosen, one.told[path + LOGITS], self.mask) for chosen, one in zip((a, b), said, strict=True)
        ]
        amplified = max(one.amplification(path + LOGITS, self.limits, self.mask) for one in said)
        lid = self.limits.lid(1, amplified)
        wrong = [side for side, error in zip("ab", errors, strict=True) if error > lid]
        blame = "both" if len(wrong) == 2 else wrong[0] if wrong else None
        return Step(path, free, fed[0], fed[1], errors[0], errors[1], lid, max(errors) / lid, blame)


def distance(value: np.ndarray, reference: np.ndarray, mask_BT: np.ndarray) -> float:
    """||value - reference|| / ||reference|| over the tokens that count; infinite where the value is not finite."""
    x, r = value[mask_BT].astype(np.float64), reference[mask_BT].astype(np.float64)
    if not (np.isfinite(x).all() and np.isfinite(r).all()):
        return math.inf
    return ruler.relative(float(np.square(x - r).sum()), float(np.square(r).sum()))


def _share(chosen: np.ndarray, other: np.ndarray, mask_BT: np.ndarray) -> float:
    """Share of the tokens for which two routers chose other experts, in whatever order."""
    return float((np.sort(chosen[mask_BT]) != np.sort(other[mask_BT])).any(axis=-1).mean())


def _shortfall(chosen: np.ndarray, logits: np.ndarray, mask_BT: np.ndarray) -> float:
    """How far the worst expert chosen lies below the worst that should have been, of the scores' size; 0: the same."""
    scores, picked = logits[mask_BT], chosen[mask_BT]
    if not np.isfinite(scores).all():
        return math.inf
    least = np.sort(scores, axis=-1)[:, -picked.shape[-1]]
    short = np.maximum(least - np.take_along_axis(scores, picked, axis=-1).min(axis=-1), 0.0)
    twice = np.array([len(set(row)) < len(row) for row in picked.tolist()])
    short = np.where(twice, np.abs(scores).max(axis=-1), short)
    return ruler.relative(float(np.square(short).sum()), float(np.square(scores).sum() / scores.shape[-1]))


def _blame(judged: Judgement) -> str | None:
    return (judged.blame or "unknown") if judged.cause is not None else None
