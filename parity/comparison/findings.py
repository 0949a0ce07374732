"""What a comparison found, as data: of tensors, tokens and routers, where it began, and the faults that were tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from parity.ruler import Cause, Side


@dataclass(frozen=True, slots=True)
class TokenError:
    """One token of one tensor: its errors, and how much of its limit is left (negative: over)."""

    tensor: str
    row: int
    position: int
    e_a: float | None
    e_b: float | None
    direct: float
    margin: float
    amplification: float = 0.0  # of rounding, by the oracle; 0 where unknown


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor under the ruler.

    Attributes:
        layer: decoder layer it is read after, from 1; 0 the embeddings; None after the layers.
        module: whose result it is, by its path in the checkpoint.
        basis: ``oracle``, or ``direct`` where no oracle has this tensor (then e_a and e_b are None).
        tokens: how many were judged; the rest is padding or follows a router flip.
        direct: relative L2 distance of a and b. ratio: the larger error over the smaller (or over the floor).
        limit: what the error of the side nearest its limit had to stay under; lid: what no error may exceed.
        margin: 1 - error / limit, so negative is over. token_margin: the same for the worst token.
        nonfinite: where the first NaN or infinity is, None without any.
    """

    name: str
    layer: int | None
    basis: Literal["oracle", "direct"]
    tokens: int
    e_a: float | None
    e_b: float | None
    direct: float
    ratio: float | None
    limit: float
    lid: float
    margin: float
    token_margin: float
    verdict: Literal["PASS", "FAIL", "SKIP"]
    cause: Cause | None = None
    blame: Side | None = None
    worst_token: TokenError | None = None
    nonfinite: str | None = None
    module: str = ""

    @property
    def used(self) -> float:
        """The share of its limit that it uses, above 1 where it fails: the worse of itself and of its worst token."""
        return 1 - min(self.margin, self.token_margin)

    @property
    def by_token(self) -> bool:
        """Whether its worst token tells more than the tensor as a whole: one bad token drowns in many good ones."""
        return self.token_margin < self.margin


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first tensor that fails, and whether the error began there or was handed down.

    Attributes:
        side: whose error is described; None is the distance between the two, without an oracle.
        before, after: the error before and after this step of the model.
        growth: after over before. usual_growth: median of the same over the other layers of both backends.
        inherited: what ``before`` would have become at the usual growth; local: the rest, in quadrature.
        suspect: the tensor on the way here over which the error grew out of the ordinary, so where to look; None when
            no step stands out.
        module, suspect_module: the same two by their paths in the checkpoint.
    """

    tensor: str
    layer: int | None
    side: Side | None
    row: int
    position: int
    before: float
    after: float
    growth: float
    usual_growth: float
    inherited: float
    local: float
    suspect: str | None
    module: str = ""
    suspect_module: str | None = None


@dataclass(frozen=True, slots=True)
class Top1:
    """Top-1 agreement of one side with its reference, on the tokens where rounding cannot decide it.

    Attributes:
        bound: largest absolute logit error of the side that shows less of it (or what the lid allows).
        decidable: tokens whose reference margin is above 2 * bound; agree: those with the reference's top-1.
        ties: the others, which prove nothing; ties_agree: of those.
        first_miss: (row, position) of the first decidable token that disagrees.
    """

    side: Side
    tokens: int
    bound: float
    decidable: int
    agree: int
    ties: int
    ties_agree: int
    first_miss: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Generated:
    """Generated tokens of the two sides, row by row up to the first difference of each.

    Attributes:
        counts: rows by outcome: equal, differs, tie, router flip, undecided (no margin is recorded for that step).
        first: (row, step) of the first difference of the worst outcome; outcome: that one.
        blame: the side that leaves the oracle's own tokens there, where the oracle generated any.
    """

    rows: int
    steps: int
    counts: dict[str, int]
    outcome: str
    first: tuple[int, int] | None = None
    blame: Side | None = None


@dataclass(frozen=True, slots=True)
class Routing:
    """Router flips: tokens whose set of experts differs.

    Attributes:
        layer_tokens: token-layers compared. flips_a: of a against its oracle (None without); flips_b; between a and b.
        tokens: unpadded tokens; excluded: those of the logits at or after a flip of their row.
        first: (decoder layer, row, position) of the first flip that excludes.
        broken: what is wrong with a router, when the flips are too many for rounding.
        broken_side: whose. broken_module: the router's path.
    """

    layer_tokens: int
    flips_a: int | None
    flips_b: int | None
    between: int
    tokens: int
    excluded: int
    first: tuple[int, int, int] | None = None
    broken: str | None = None
    broken_side: Side | None = None
    broken_module: str | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """One place where the oracle tried a fault, and whether this comparison would have seen it there.

    Attributes:
        module: whose weight; ``*`` stands for every expert's number.
        kind: of the fault: the weight multiplied by 1 + size, or, where a norm takes that out again, noise.
        size: of the fault, relative.
        tensor: the first it reaches.
        factor_a, factor_b: how much of this fault the errors of a and of b hold (0.01: all of one percent); None where
            that tensor is not in the traces.
        deviation: standard deviation of the two.
        least: the smallest such fault that would have failed. least_by_size: the smallest that would have because it is
            too large to be rounding, so also one that moves every token as much, but in some other direction.
        cause, blame: what the factors say; None when nothing is wrong.
    """

    module: str
    kind: Literal["scale", "noise"]
    size: float
    tensor: str
    factor_a: float | None
    factor_b: float | None
    deviation: float | None
    least: float
    least_by_size: float
    cause: Cause | None = None
    blame: Side | None = None

    @property
    def is_seen(self) -> bool:
        """Whether a fault of this size here would have failed."""
        return self.least <= self.size

    @property
    def block(self) -> str:
        """The part of the model it is in: ``self_attn``, ``linear_attn``, ``mlp``, ``layernorm``, or the module."""
        _, is_layer, rest = self.module.partition(".layers.")
        part = rest.split(".")[1] if is_layer else self.module.rpartition(".")[2]
        return "layernorm" if part.endswith("_layernorm") else part
