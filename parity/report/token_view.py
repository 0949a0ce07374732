"""One token from the inside: what each side would say next, how sure it is, and its errors from layer to layer."""

from __future__ import annotations

import html
import math
import numbers
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from parity import ruler
from parity.comparison.case import Case
from parity.comparison.outcome import Comparison
from parity.report.sparkline import bars
from parity.report.style import framed
from parity.wording import number, told_share

LOGITS = "logits"
BEGINS = 8.0  # times the error before, at least, for a module to be where it begins


@dataclass(frozen=True, slots=True)
class Pick:
    """One of the best tokens of one side: its id, its logit, and the probability that the logits give it."""

    token_id: int
    logit: float
    probability: float


@dataclass(frozen=True, slots=True)
class Speaker:
    """What one side says after a token.

    Attributes:
        label: backend, or the oracle.
        picks: its best tokens, best first.
        margin: best logit minus second best.
        kl: of the oracle's distribution from this one, in nats; of the two sides from each other without an oracle;
            None of the oracle itself.
    """

    label: str
    picks: tuple[Pick, ...]
    margin: float
    kl: float | None


@dataclass(frozen=True, slots=True)
class Stage:
    """One tensor at this token: relative errors of both sides, their distance, and the share of the limit used.

    ``module`` is whose result it is. Errors are None without an oracle, the share where the token was not judged.
    """

    tensor: str
    e_a: float | None
    e_b: float | None
    direct: float
    used: float | None
    module: str = ""


@dataclass(frozen=True)
class TokenView:
    """One token of a comparison.

    Attributes:
        row, position: where; token_id: what was put in, None where the traces do not say.
        judged: whether it counts: it is no padding, and follows no router flip.
        speakers: a, b and, where there is one, the oracle; empty without logits.
        stages: every tensor at this token, in the order of computation.
        u: the unit roundoff of what was computed in: growth from exact copies is counted from it.
    """

    labels: tuple[str, str]
    row: int
    position: int
    token_id: int | None
    judged: bool
    speakers: tuple[Speaker, ...]
    stages: tuple[Stage, ...]
    u: float

    @property
    def begins(self) -> str:
        """In which module most of its error begins, in a sentence; empty where it is within its limits."""
        first = next((stage for stage in self.stages if (stage.used or 0.0) > 1), None)
        if first is None:
            return ""
        errors = [stage.direct for stage in self.stages]
        if first.e_a is not None and first.e_b is not None:
            is_b = first.e_b > first.e_a
            errors = [(stage.e_b if is_b else stage.e_a) or 0.0 for stage in self.stages]
        before = [0.0, *errors[:-1]]
        growths = [
            after / max(one, self.u) if math.isfinite(one) else 1.0 for one, after in zip(before, errors, strict=True)
        ]
        index = growths.index(max(growths))
        if growths[index] < BEGINS:
            return "No module stands out: its error builds up from one to the next."
        what = f"{number(before[index])} before it, {number(errors[index])} behind it; what follows hands that on"
        return f"Most of its error begins in {self.stages[index].module}: {what}."

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)

    def __repr__(self) -> str:
        lines = [self._title()]
        if self.speakers:
            lines += ["", _columns(_said(self))]
        lines += ["", _columns(_stages(self)), *([self.begins] if self.begins else [])]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        judged = [stage for stage in self.stages if stage.used is not None]
        drawn = bars(
            [stage.module for stage in judged],
            [stage.used or 0.0 for stage in judged],
            "Share of its limit that this token uses in each module's result, in the order of computation. A bar over"
            " the line fails.",
        )
        said = (
            f"<h3>What each would say next: token id, probability (logit)</h3>{_html(_said(self), marked=True)}"
            if self.speakers
            else ""
        )
        table = f"<details><summary>Errors of this token in numbers</summary>{_html(_stages(self))}</details>"
        begins = f'<p class="sentence">{html.escape(self.begins)}</p>' if self.begins else ""
        drawn = f"<h3>Its error, module by module</h3>{begins}{drawn}" if drawn else ""
        return framed(f"<h2>{html.escape(self._title())}</h2>{said}{drawn}{table}")

    def _title(self) -> str:
        what = "" if self.token_id is None else f", token id {self.token_id}"
        note = "" if self.judged else " (not judged: padding, or it follows a router flip)"
        return f"Row {self.row}, position {self.position}{what}{note}"


def look_at(comparison: Comparison, place: tuple[int, ...], top: int) -> TokenView:
    """See ``Comparison.token``."""
    case = comparison.case
    if case is None:
        raise ValueError(f"there are no two tokens to hold against each other. {comparison.summary}")
    if top < 1:
        raise ValueError(f"top={top}, expected at least 1.")
    row, position = _where(comparison, case, place)
    ids = case.a.tensors.get("input_ids")
    used = {name: array[row, position] for name, array in comparison.token_used.items() if position < array.shape[1]}
    stages = tuple(_stage(case, name, row, position, used) for name in case.names if _reaches(case, name, position))
    return TokenView(
        labels=case.labels,
        row=row,
        position=position,
        token_id=None if ids is None else int(ids[row, position]),
        judged=any(stage.used is not None for stage in stages),
        speakers=_speakers(case, row, position, top) if LOGITS in case.names else (),
        stages=stages,
        u=case.limits.u,
    )


def _where(comparison: Comparison, case: Case, place: tuple[int, ...]) -> tuple[int, int]:
    """Row and position, counted from the start."""
    worst = comparison.worst_token
    default = (0, 0) if worst is None else (worst.row, worst.position)
    if len(place) > 2:
        raise ValueError(f"token{place} has {len(place)} numbers, expected a position, or a row and a position.")
    if not all(isinstance(index, numbers.Integral) for index in place):
        raise ValueError(f"token{place}: expected whole numbers, a position, or a row and a position.")
    given = default if not place else (default[0], place[0]) if len(place) == 1 else place
    shape = case.a.shape
    if not all(-size <= index < size for index, size in zip(given, shape, strict=True)):
        raise ValueError(f"there is no token at row {given[0]}, position {given[1]}: the traces are {list(shape)}.")
    return tuple(index % size for index, size in zip(given, shape, strict=True))  # pyright: ignore[reportReturnType]


def _reaches(case: Case, name: str, position: int) -> bool:
    return position < case.a.tensors[name].shape[1]  # the draft's tensors are one shorter


def _stage(case: Case, name: str, row: int, position: int, used: dict[str, np.ndarray]) -> Stage:
    a, b = (trace.tensors[name][row, position].astype(np.float64) for trace in (case.a, case.b))
    e_a = e_b = None
    if case.has_oracle(name) and case.oracle_a and case.oracle_b:
        r_a, r_b = (o.tensors[name][row, position].astype(np.float64) for o in (case.oracle_a, case.oracle_b))
        e_a, e_b = _relative(a, r_a), _relative(b, r_b)
    share = float(used.get(name, np.float32(np.nan)))
    return Stage(name, e_a, e_b, _relative(a, b), None if np.isnan(share) else share, case.module_of(name))


def _relative(x: np.ndarray, reference: np.ndarray) -> float:
    with np.errstate(invalid="ignore", over="ignore"):
        error = float(np.square(x - reference).sum())
    return ruler.relative(error, float(np.square(reference).sum())) if np.isfinite(error) else float("inf")


def _speakers(case: Case, row: int, position: int, top: int) -> tuple[Speaker, ...]:
    sides = list(zip(case.labels, (case.a, case.b), strict=True))
    own = [trace.tensors[LOGITS][row, position].astype(np.float64) for _, trace in sides]
    if case.has_oracle(LOGITS) and case.oracle_a and case.oracle_b:
        oracles = [
            oracle.tensors[LOGITS][row, position].astype(np.float64) for oracle in (case.oracle_a, case.oracle_b)
        ]
        one = case.oracle_a is case.oracle_b
        told = (
            [("oracle", oracles[0])]
            if one
            else [(f"oracle of {label}", x) for (label, _), x in zip(sides, oracles, strict=True)]
        )
    else:
        oracles, told = own[::-1], []
    out = [_speaker(label, x, top, oracle) for (label, _), x, oracle in zip(sides, own, oracles, strict=True)]
    return (*out, *(_speaker(label, x, top, None) for label, x in told))


def _speaker(label: str, logits: np.ndarray, top: int, reference: np.ndarray | None) -> Speaker:
    best = np.argsort(-logits, kind="stable")[: max(top, 2)]
    kl = None
    with np.errstate(invalid="ignore"):  # what is not finite says nothing, and is told so
        said = _log_softmax(logits)
        margin = float(logits[best[0]] - logits[best[1]]) if len(best) > 1 else float("inf")
        if reference is not None:
            meant = _log_softmax(reference)
            found = float(np.exp(meant) @ (meant - said))
            kl = float("inf") if np.isnan(found) else max(0.0, found)
    picks = tuple(Pick(int(i), float(logits[i]), float(np.exp(said[i]))) for i in best[:top])
    return Speaker(label, picks, margin, kl)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def _said(view: TokenView) -> list[list[str]]:
    """A column for each speaker; the first row is the head."""
    lines = [["", *(speaker.label for speaker in view.speakers)]]
    for rank in range(max(len(speaker.picks) for speaker in view.speakers)):
        picks = [speaker.picks[rank] for speaker in view.speakers]
        lines.append([f"top {rank + 1}", *(f"id {p.token_id}  {p.probability:.1%}  ({p.logit:.4g})" for p in picks)])
    lines.append(["margin", *(f"{speaker.margin:.3g}" for speaker in view.speakers)])
    kl = [speaker.kl for speaker in view.speakers]
    lines.append(["KL, nats", *("" if value is None else number(value) for value in kl)])
    return lines


def _stages(view: TokenView) -> list[list[str]]:
    a, b = view.labels
    lines = [["output of", f"e({a})", f"e({b})", f"{a} to {b}", "used"]]
    for one in view.stages:
        used = "not judged" if one.used is None else told_share(one.used)
        lines.append([one.module, number(one.e_a), number(one.e_b), number(one.direct), used])
    return lines


def _columns(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _html(lines: list[list[str]], *, marked: bool = False) -> str:
    """``marked``: what differs from the last column is tinted."""
    head, *rest = lines
    body = []
    for line in rest:
        odd = marked and line[0].startswith("top") and len({cell.split("  ")[0] for cell in line[1:]}) > 1
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in line)
        body.append(f'<tr class="{"differs" if odd else ""}">{cells}</tr>')
    titles = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f'<div class="scroll"><table><tr>{titles}</tr>{"".join(body)}</table></div>'
