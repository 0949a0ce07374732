"""The three-way ruler: two backends held against an oracle instead of against a tolerance.

With r the float64 oracle on the stored weights and e(x) = ||x - r|| / ||r|| over the positions that count, a backend
passes when ``e(ours) <= k * max(e(peer), floor)`` and both stay under an absolute lid ``c * u * sqrt(L)``. The peer's
own rounding sets the tolerance, so nobody tunes one per model; the lid catches two backends that are wrong alike. Both
directions are checked, so an unusually bad peer is named and does not make our error look small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Side = Literal["a", "b", "both"]
Cause = Literal["rounding", "bug", "peer is the outlier", "both wrong", "router flip", "tie"]


@dataclass(frozen=True, slots=True)
class Limits:
    """The constants of one compute dtype; ``REASONS`` says why each is what it is."""

    u: float  # unit roundoff, and the floor: no error is held against less than one rounding
    k: float  # how many times the peer's error a tensor may be off
    k_token: float  # the same for one token
    c: float  # the lid, in u * sqrt(L)

    @property
    def layer(self) -> float:
        """About what one layer alone is off: a rounding in bfloat16; in float32 the order of its sums adds to it."""
        return self.u * self.c / LIMITS["bfloat16"].c

    def lid(self, num_layers: int, amplification: float = 0.0) -> float:
        """The error no backend may exceed, however bad its peer; L counts as at least one layer.

        A model that amplifies rounding more than sqrt(L) is allowed as much more, but never to be half wrong.
        """
        plain = self.c * self.u * math.sqrt(max(num_layers, 1))
        return max(plain, min(self.c * self.u * amplification, MOST))

    def token_lid(self, num_layers: int, amplification: float = 0.0) -> float:
        """The lid for a single token. Where rounding decides it may point anywhere, but not be of another size."""
        plain = TOKEN_LID * self.lid(num_layers)
        return max(plain, min(TOKEN_LID * self.c * self.u * amplification, MOST_TOKEN))

    def amplification_of(self, angle_error: np.ndarray) -> np.ndarray:
        """The amplification that allows as much as float32's angles may be off, which is the same in every dtype."""
        return ANGLES * angle_error / (self.c * self.u)

    def may_turn(self, amplification: np.ndarray) -> np.ndarray:
        """Which tokens rounding alone may turn around, so that they are judged for themselves and tell nothing else."""
        return self.k_token * self.layer * amplification > 1.0


LIMITS = {
    "bfloat16": Limits(u=2.0**-8, k=2.0, k_token=8.0, c=8.0),
    "float32": Limits(u=2.0**-24, k=4.0, k_token=12.0, c=40.0),
}

# Shares and counts that no dtype changes.
TOKEN_LID = 4.0  # a single token may be so many lids off
ANGLES = 4.0  # how many times what a random rounding of angles does they may be off
MOST, MOST_TOKEN = 0.5, 2.0  # no amplification allows more: a tensor half wrong, a token more than turned around
MIN_REMAINING = 0.25  # of the tokens must be left in the logits after router flips
ROUTER_SHARE = 0.25  # of the chosen experts may differ in one layer before the router itself is at fault
ROUTER_TOKENS = 16  # tokens needed to judge a router
FACTOR = 0.005  # half a percent: a weight's factor may be off by so much (parity.comparison.sensitivity)
FACTOR_DEVIATIONS = 6.0  # and has to be off by so many standard deviations
FACTOR_TOKENS = 32  # a deviation estimated from fewer is itself unknown
FACTOR_DIFFERENT = 20  # and so many of them different: (sum of copies)^2 / sum of their squares
SEEN_DEVIATIONS = 2.0  # a fault counts as seen when it lies so many above that
STEP = 4.0  # an error that grows this much more over one layer than over the others began there

REASONS = {
    "u": "half an ulp of the compute dtype; below it an error is one rounding, and exact copies have error 0.",
    "k": "two correct bf16 variants differ by at most 1.04x over 12 to 40 seeds, so 2 has headroom and is tight; fp32"
    " kernels differ more in the order of their sums.",
    "k_token": "single tokens scatter: over 40 seeds of dense and MoE, JAX against torch, up to 4.1x in bf16, 6.2x"
    " in fp32 (benchmarks/calibrate_ruler.py); twice that. A token's floor is the median of the peer's errors, or a"
    " token where the peer was lucky would fail us.",
    "amplification": "a gated delta net norms what may nearly cancel: correct bf16 runs were off by up to 0.9 at single"
    " tokens, and 6 of 24 hybrid pairs passed without it; with it all did. A peer may be lucky at such a token: of 300"
    " random narrow hybrids 11 were accused until whole tensors counted it too, 2 since (benchmarks/results).",
    "ANGLES": "float32's angles at positions 32000 to 10^6 put correct runs of three families 0.28 to 0.57 times as far"
    " off as random roundings of them do in the oracle, single tokens up to 3.2 times; this leaves 7x and 5x.",
    "TOKEN_LID": "catches a token that both backends get wrong alike; the largest seen is a third of it.",
    "c": "block output error grows as 1.85u*sqrt(l) in bf16 and logits reach 14u at L=4 in fp32; 8 and 40 leave 4x and"
    " 6x. Toy-size measurements: recalibrate at 28 to 94 layers.",
    "MIN_REMAINING": "a verdict on fewer tokens would be luck; replay the routing instead.",
    "ROUTER_SHARE": "correct bf16 runs flip 0.5 to 9 % of layer-tokens, mostly one expert of many; a wrong router"
    " shares only X/E of them.",
    "ROUTER_TOKENS": "with 9 % of tokens flipping one of two experts, 16 tokens pass a quarter once in 4*10^5 layers.",
    "FACTOR": "the factors of correct weights come out within 0.1 % where they show well (benchmarks/results); Gemma's"
    " rounded sqrt(hidden_size) is 0.19 % off.",
    "FACTOR_DEVIATIONS": "960 comparisons of correct runs (40 seeds, dense and MoE, both dtypes, JAX compiled and not,"
    " torch, transformers) use at most 0.56 of the limit that the two make.",
    "FACTOR_TOKENS": "three tokens happen to agree, and the deviation looks small.",
    "FACTOR_DIFFERENT": "equal tokens round alike, so ten of one are one; two rows of a prompt share a few.",
    "SEEN_DEVIATIONS": "39 of 40 faults of that size lie above the limit.",
    "STEP": "correct layers grow the error 1.1x to 1.4x each; one stale norm grew it 20x.",
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the ruler says about one pair of errors.

    Attributes:
        limit: the limit of the side nearest to, or furthest over, its own.
        used: that side's error over its limit; above 1 fails.
        cause: None when it passes.
        blame: the side at fault; None when it passes.
    """

    limit: float
    used: float
    cause: Cause | None = None
    blame: Side | None = None


def judge(e_a: float, e_b: float, *, k: float, lid: float, floor_a: float, floor_b: float) -> Judgement:
    """Hold the error of ours (a) and of the peer (b) against each other and against the lid.

    ``floor_a`` is the least that a's error counts for when b is held against it, ``floor_b`` the reverse; above zero.
    """
    over_a, over_b = e_a > k * max(e_b, floor_b), e_b > k * max(e_a, floor_a)
    limit_a, limit_b = min(k * max(e_b, floor_b), lid), min(k * max(e_a, floor_a), lid)
    limit, used = max(((limit_a, e_a / limit_a), (limit_b, e_b / limit_b)), key=lambda pair: pair[1])
    # Over the lid without being over the ruler means that the other one is about as far off.
    if (e_a > lid and e_b > lid) or ((e_a > lid or e_b > lid) and not (over_a or over_b)):
        return Judgement(limit, used, "both wrong", "both")
    if over_a:
        return Judgement(limit, used, "bug" if e_a > lid else "rounding", "a")
    if over_b:
        return Judgement(limit, used, "peer is the outlier", "b")
    return Judgement(limit, used)


def judge_direct(distance: float, *, lid: float) -> Judgement:
    """Without an oracle: two backends under the lid are at most twice the lid apart. Whose fault is unknown."""
    limit = 2 * lid
    used = distance / limit
    return Judgement(limit, used, "bug" if used > 1 else None)


def used_by_token(
    e_a: np.ndarray,
    e_b: np.ndarray,
    *,
    k: float,
    lid: np.ndarray | float,
    u: float,
    least: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Share of its limit that each token uses, of the worse side: float64 [n] from errors by token, float64 [n].

    ``least``: what an error counts for at least where the model amplifies rounding, by token.
    """
    clamped_a = np.maximum(np.maximum(e_a, token_floor(e_a, u)), least)
    clamped_b = np.maximum(np.maximum(e_b, token_floor(e_b, u)), least)
    return np.maximum(e_a / np.minimum(k * clamped_b, lid), e_b / np.minimum(k * clamped_a, lid))


def token_floor(errors: np.ndarray, u: float) -> float:
    """The least a token's error counts for: the median of the tokens, and never less than one rounding."""
    return max(u, float(np.median(errors))) if errors.size else u


def ratio(e_a: float, e_b: float, floor: float) -> float:
    """The larger error over the smaller, which counts for at least the floor."""
    return math.inf if math.inf in (e_a, e_b) else max(e_a, e_b) / max(min(e_a, e_b), floor)


def relative(error_sq: float, scale_sq: float) -> float:
    """sqrt(error_sq / scale_sq) that knows what 0 / 0 means here: no error."""
    if error_sq == 0:
        return 0.0
    return math.sqrt(error_sq / scale_sq) if scale_sq > 0 else math.inf


def relative_by_token(error_sq: np.ndarray, scale_sq: np.ndarray) -> np.ndarray:
    """The same for every token, float64 [n]; a token whose reference is zero is held against the mean token."""
    mean = float(scale_sq.mean()) if scale_sq.size else 0.0
    scale = np.where(scale_sq > 0, scale_sq, mean)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(error_sq == 0, 0.0, np.sqrt(error_sq / scale))
