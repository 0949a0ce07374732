"""The outcome of a comparison: what was found, as data. Texts and pages are made from it elsewhere."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from parity.ruler import Cause, Limits, Side

if TYPE_CHECKING:
    from parity.case import Case
    from parity.live_pairs import LivePair
    from parity.nearest import Likeness
    from parity.notebook import Heat, LayerPlot, Table
    from parity.token_view import TokenView

Verdict = Literal["PASS", "FAIL", "INVALID", "INCONCLUSIVE", "SKIP"]
_NOT_JSON = ("token_used", "case", "pair")
EXIT_CODES: dict[Verdict, int] = {"PASS": 0, "FAIL": 1, "INVALID": 3, "INCONCLUSIVE": 4, "SKIP": 5}


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


@dataclass(frozen=True, slots=True)
class Top1:
    """Top-1 agreement of one side with its reference, on the tokens where rounding cannot decide it.

    Attributes:
        bound: largest absolute logit error that the other side shows (or the lid allows).
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
        broken_side: whose.
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


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison:
    """Two traces compared. ``summary`` answers in one sentence: rounding or bug, where, and whose?

    In a notebook it shows itself, and ``table``, ``plot_layers``, ``token``, ``heat`` and ``inject`` look closer.

    Attributes:
        cause: what a FAIL is; on other verdicts what kept it from being a plain pass (``tie``, ``router flip``).
        whose: the side at fault, ``a`` is ours and ``b`` the peer; None when nobody is, or nobody knows.
        labels: what a and b are called. meta: facts about them (and the oracle), without digests.
        probes: faults that the oracle tried, and whether they would have been seen here; empty where it tried none.
        profile: of a FAIL with an oracle, what it looks like (``parity.profile``), for ``nearest_mutant``.
        commands: what shows a FAIL again, and takes it apart.
        reasons: why an INVALID, INCONCLUSIVE or SKIP is one. notes: what a reader should know beside the verdict.
        token_used: share of its limit that every token used, float32 [B, T] by tensor; NaN where not judged.
        case: the traces themselves, for a closer look; None where they could not be compared.
        pair: the live models they were recorded from; None of traces alone.
    """

    verdict: Verdict
    summary: str
    cause: Cause | None = None
    whose: Side | None = None
    labels: tuple[str, str] = ("a", "b")
    meta: tuple[dict[str, Any], ...] = ()
    dtype: str = ""
    num_layers: int = 0
    limits: Limits | None = None
    rows: tuple[TensorRow, ...] = ()
    worst_token: TokenError | None = None
    divergence: Divergence | None = None
    top1: tuple[Top1, ...] = ()
    generated: Generated | None = None
    routing: Routing | None = None
    probes: tuple[Probe, ...] = ()
    profile: dict[str, float] | None = None
    commands: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    token_used: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    case: Case | None = field(default=None, compare=False)
    pair: LivePair | None = field(default=None, compare=False)

    @property
    def exit_code(self) -> int:
        """0 pass, 1 differs, 3 not comparable, 4 inconclusive, 5 no such device."""
        return EXIT_CODES[self.verdict]

    @classmethod
    def skipped(cls, reason: str) -> Comparison:
        """A comparison that could not take place, because a device or a backend is missing."""
        return cls(verdict="SKIP", summary=f"Skipped: {reason}", reasons=(reason,))

    def nearest_mutant(self, count: int = 3) -> list[Likeness]:
        """The planted bugs that this failure looks most like, by falling similarity; none where nothing failed."""
        from parity.nearest import nearest  # reads its library

        return nearest(self.profile)[:count] if self.profile else []

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON values; NaN and infinities become strings, since JSON has none."""
        document = {name: value for name, value in vars(self).items() if name not in _NOT_JSON}
        for name in ("limits", "worst_token", "divergence", "generated", "routing"):
            document[name] = asdict(document[name]) if document[name] else None
        for name in ("rows", "top1", "probes"):
            document[name] = [asdict(item) for item in document[name]]
        alike = [asdict(likeness) for likeness in self.nearest_mutant()]
        return {"schema": 1, **_jsonable(document), "nearest_mutants": alike, "exit_code": self.exit_code}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_text(self) -> str:
        """The comparison for a terminal: the sentence, the tensors that matter, the token counts."""
        from parity.comparison_text import render  # texts are not needed to decide anything

        return render(self)

    def table(self) -> Table:
        """Every tensor with its errors, its limit and its margin: as text, as HTML, ``to_dict()``, ``to_pandas()``."""
        from parity.notebook import Table

        return Table(self)

    def plot_layers(self) -> LayerPlot:
        """Errors by layer on a log scale, with the limits: an SVG that needs no plotting library."""
        from parity.notebook import LayerPlot

        return LayerPlot(self)

    def token(self, *place: int, top: int = 5) -> TokenView:
        """One token from the inside: what each side would say next, and its errors from layer to layer.

        Args:
            place: ``(row, position)``, ``(position,)`` in the row of the worst token, or nothing for that token itself;
                negative ones count from the end.
            top: how many of the best tokens to list.
        Raises:
            ValueError: no such place, or the traces could not be compared.
        """
        from parity.token_view import look_at

        return look_at(self, place, top)

    def heat(self, name: str | None = None) -> Heat:
        """Tokens by rows, coloured by the share of its limit that each uses; None: the rows, and the worst by tensor.

        ``name``: a tensor of the trace (``hidden_states.7``), or the layer it is read after (``layers.6``).

        Raises:
            ValueError: that tensor was not judged; says which were.
        """
        from parity.notebook import Heat

        return Heat(self, name)

    def inject(self, path: str, *, into: Side = "b") -> Comparison:
        """Run one side again with the other's value at ``path`` in the place of its own, and compare again.

        What was wrong before ``path`` is healed so, and what remains is wrong after it.

        Args:
            path: of a module, as the checkpoint spells it (``layers.7``, ``layers.7.mlp``), or a tensor of the trace.
            into: the side that is run again, ``a`` or ``b``.
        Raises:
            ValueError: there are traces only and no live models, or no such path.
        """
        if self.pair is None:
            raise ValueError(
                "inject runs a model again, and this comparison was made from traces alone. Make it from live models:"
                " parity.live_pair(CHECKPOINT).compare()."
            )
        return self.pair.inject(self, path, into=into)

    def __repr__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        from parity.report import render_fragment

        return render_fragment(self)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
