"""The outcome of a comparison: what was found, as data. Texts and pages are made from it elsewhere."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from parity.comparison.findings import Divergence, Generated, Probe, Routing, TensorRow, TokenError, Top1
from parity.ruler import Cause, Limits, Side
from parity.trace_layout import module_of
from parity.wording import cause_word

if TYPE_CHECKING:
    from parity.comparison.case import Case
    from parity.comparison.nearest import Likeness
    from parity.lifecycle.live_pairs import LivePair
    from parity.report.notebook import Heat, LayerPlot, Table
    from parity.report.token_view import TokenView

Verdict = Literal["PASS", "FAIL", "INVALID", "INCONCLUSIVE", "SKIP"]
_NOT_JSON = ("token_used", "case", "pair")
EXIT_CODES: dict[Verdict, int] = {"PASS": 0, "FAIL": 1, "INVALID": 3, "INCONCLUSIVE": 4, "SKIP": 5}


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison:
    """Two traces compared. ``summary`` answers in one sentence: rounding or bug, where, and whose?

    In a notebook it shows itself, and ``table``, ``plot_layers``, ``token``, ``heat`` and ``inject`` look closer.

    Attributes:
        headline: the same in one clause: whose fault it is and where. summary: this, and then why.
        cause: what a FAIL is; on other verdicts what kept it from being a plain pass (``tie``, ``router flip``).
        whose: the side at fault, ``a`` is ours and ``b`` the peer; None when nobody is, or nobody knows.
        labels: what a and b are called. meta: facts about them (and the oracle), without digests.
        probes: faults that the oracle tried, and whether they would have been seen here; empty where it tried none.
        profile: of a FAIL with an oracle, what it looks like (``parity.comparison.profile``), for ``nearest_mutant``.
        parts: of the architecture (``nearest.PARTS``); known bugs of others are left out. None: not known.
        text_path: where the checkpoint has its text model, so ``model`` of ``model.layers.3``.
        experiment: what was done to one side on purpose, where that was: then the verdict is of the experiment, not of
            the backends as they are.
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
    headline: str = ""
    experiment: str | None = None
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
    parts: tuple[str, ...] | None = None
    text_path: str = "model"
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
        return cls(verdict="SKIP", headline="Skipped", summary=f"Skipped: {reason}", reasons=(reason,))

    @property
    def detail(self) -> str:
        """The summary without the headline."""
        return self.summary.removeprefix(self.headline).lstrip(".: ")

    @property
    def kind(self) -> str:
        """The verdict as a reader is told it: ``PASS``, ``FAIL (bug)``; an experiment is said to be one."""
        word = cause_word(self.cause)
        told = self.verdict + (f" ({word})" if word else "")
        return f"EXPERIMENT, {told}" if self.experiment else told

    @property
    def worst_row(self) -> TensorRow | None:
        """The tensor to look at: the first that fails, since later ones inherit from it, else nearest to its limit."""
        judged = [row for row in self.rows if row.verdict != "SKIP"]
        first = self.divergence.tensor if self.divergence else None
        return next((row for row in judged if row.name == first), max(judged, key=lambda row: row.used, default=None))

    def module_of(self, tensor: str) -> str:
        """The module whose result a tensor of the trace is: what a reader knows it by."""
        return module_of(tensor, self.text_path)

    def nearest_mutant(self, count: int = 3) -> list[Likeness]:
        """The known bugs that this failure resembles most, by falling similarity; none where nothing failed.

        Only those that a model of this architecture can have, and no match that is not a good one.
        """
        from parity.comparison.nearest import FLOOR, nearest  # reads its library

        found = nearest(self.profile, parts=self.parts)[:count] if self.profile else []
        return [one for one in found if one.similarity >= FLOOR]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON values; NaN and infinities become strings, since JSON has none."""
        document = {name: value for name, value in vars(self).items() if name not in _NOT_JSON}
        for name in ("limits", "worst_token", "divergence", "generated", "routing"):
            document[name] = asdict(document[name]) if document[name] else None
        for name in ("rows", "top1", "probes"):
            document[name] = [asdict(item) for item in document[name]]
        alike = [asdict(likeness) for likeness in self.nearest_mutant()]
        return {"schema": 1, **jsonable(document), "nearest_mutants": alike, "exit_code": self.exit_code}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_text(self) -> str:
        """The comparison for a terminal: the sentence, the tensors that matter, the token counts."""
        from parity.comparison.text import render  # texts are not needed to decide anything

        return render(self)

    def table(self) -> Table:
        """Every tensor with its errors, its limit and its margin: as text, as HTML, ``to_dict()``, ``to_pandas()``."""
        from parity.report.notebook import Table

        return Table(self)

    def plot_layers(self) -> LayerPlot:
        """Errors by layer on a log scale, with the limits: an SVG that needs no plotting library."""
        from parity.report.notebook import LayerPlot

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
        from parity.report.token_view import look_at

        return look_at(self, place, top)

    def heat(self, name: str | None = None) -> Heat:
        """Tokens by rows, coloured by the share of its limit that each uses; None: the rows, and the worst by tensor.

        ``name``: the module whose result to look at (``layers.6``, ``lm_head``), or a tensor of the trace.

        Raises:
            ValueError: that tensor was not judged; says which were.
        """
        from parity.report.notebook import Heat

        return Heat(self, name)

    def inject(self, path: str, *, into: Side | None = None) -> Comparison:
        """Run one side again with the other's value at ``path`` in the place of its own, and compare again.

        In the side at fault what was wrong before ``path`` is healed so, and what remains is wrong after it. Past a
        part of a layer (``layers.7.mlp``) the residual stream goes on unhealed; past a whole layer nothing does. The
        other side may go on from a value of the one at fault, too: then it shows whether the value was right.

        Args:
            path: of a module, as the checkpoint spells it (``layers.7``, ``layers.7.mlp``), or a tensor of the trace.
            into: the side that is run again, ``a`` or ``b``; None: the one at fault, or ``b`` where that is not known.
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
        from parity.report.page import render_fragment

        return render_fragment(self)


def jsonable(value: Any) -> Any:
    """A document as JSON can hold it: NaN and infinities as text, keys too."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
