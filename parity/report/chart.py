"""Errors by module as an inline SVG: both backends on a log scale, the limits."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Literal

from parity.comparison.findings import TensorRow
from parity.comparison.outcome import Comparison
from parity.ruler import Limits
from parity.wording import number, short_name

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 54, 116, 18, 34
TICKS = 12  # names along the axis, at most
WIDE = 8  # so many names have room for ``layers.3``; of more the layers are told by number
Point = tuple[float, float]
Which = Literal["a", "b"]


def error_chart(comparison: Comparison) -> str:
    """The chart of one comparison; empty without a tensor that was judged."""
    rows = [row for row in comparison.rows if row.verdict != "SKIP"]
    if not rows or comparison.limits is None:
        return ""
    of = _whose(comparison)
    limit = [_limit(row, of, comparison.limits) for row in rows]
    lid = [row.lid if row.basis == "oracle" else row.limit for row in rows]
    scale = _Scale(rows, limit, comparison.limits.u)
    limits = [scale.point(i, value) for i, value in enumerate(limit)]
    lids = [scale.point(i, value) for i, value in enumerate(lid)]
    area = [(scale.x(0), scale.y(0)), *limits, (scale.x(len(rows) - 1), scale.y(0))]
    parts = [f'<polygon class="area" points="{_points(area)}"/>', *_axes(scale, rows)]
    parts.append(f'<polyline class="lid" points="{_points(lids)}"/>')
    parts.append(f'<polyline class="limit" points="{_points(limits)}"/>')
    labels = [(lids[-1][1], "lid-text", "absolute limit"), (limits[-1][1], "limit-text", limit_label(comparison))]
    slots = colours(comparison.labels)
    series = [(slots[side == "b"], label, values) for side, label, values in _series(comparison, rows)]
    for css, label, values in sorted(series, reverse=True):  # the thick line under the thin one
        points = [scale.point(i, value) for i, value in enumerate(values)]
        parts.append(f'<polyline class="e{css}" points="{_points(points)}"/>')
        parts += [
            f'<circle class="p{css}" cx="{x:.1f}" cy="{y:.1f}" r="{scale.radius}"><title>{html.escape(label)} at'
            f" {html.escape(row.module)}: {number(value)}, limit {number(row.limit)}</title></circle>"
            for (x, y), row, value in zip(points, rows, values, strict=True)
        ]
        labels.append((points[-1][1], f"l{css}", label))
    parts += _marks(scale, rows, comparison)
    parts += [
        f'<text class="{css}" x="{WIDTH - RIGHT + 8}" y="{y + 4:.1f}">{html.escape(text[:18])}</text>'
        for y, css, text in _spread(labels)
    ]
    title = html.escape(f"Relative error by module of {' and '.join(comparison.labels)}, log scale")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'


def chart_key(comparison: Comparison) -> str:
    """What the chart shows, for those who see it for the first time."""
    limits = comparison.limits
    if limits is None:
        return ""
    if all(row.basis == "direct" for row in comparison.rows):
        what = "Distance of the two, relative (log scale), of what each module hands on. Without an oracle it may be up"
        what += " to twice what a correct backend can be off (dashed)."
    else:
        a, b = comparison.labels
        one, other = (a, b) if _whose(comparison) == "a" else (b, a)
        what = "Distance from the float64 oracle, relative (log scale), of what each module hands on. Green:"
        what += f" {one} may be {limits.k:g}x as far off as {other}. Dashed, the absolute limit: no correct"
        what += f" {comparison.dtype} backend is so far off, whatever the other one is."
    failing = any(row.verdict == "FAIL" for row in comparison.rows)
    what += " Ringed: over its limit, or one of its tokens is." if failing else ""
    return f'<p class="key">{html.escape(what)}</p>'


def colours(labels: tuple[str, str]) -> tuple[Which, Which]:
    """The colours of a and b. JAX and torch keep theirs, whichever comes first."""
    a, b = (label.partition(" ")[0] for label in labels)
    is_turned = (a == "torch" and b != "torch") or (b == "jax" and a != "jax")
    return ("b", "a") if is_turned else ("a", "b")


def limit_label(comparison: Comparison) -> str:
    """Whose limit is drawn."""
    if all(row.basis == "direct" for row in comparison.rows):
        return "limit"
    return f"{comparison.labels[_whose(comparison) == 'b']}'s limit"


def _whose(comparison: Comparison) -> Which:
    """The side whose limit is drawn: the one at fault, else the one that comes nearest to its own."""
    if comparison.whose in ("a", "b"):
        return comparison.whose
    row = comparison.worst_row
    return "b" if row is not None and (row.e_b or 0.0) > (row.e_a or 0.0) else "a"


def _limit(row: TensorRow, side: Which, limits: Limits) -> float:
    """What one side may be off, which is made of what the other one is."""
    other = row.e_b if side == "a" else row.e_a
    return row.limit if other is None else min(limits.k * max(other, limits.u), row.lid)


class _Scale:
    """From (index of a tensor, error) to pixels; what is too small or not finite is drawn at the edge."""

    def __init__(self, rows: Sequence[TensorRow], limit: Sequence[float], u: float) -> None:
        errors = [value for row in rows for value in (row.e_a, row.e_b, row.direct, row.limit, row.lid) if value]
        finite = [value for value in (*errors, *limit) if math.isfinite(value) and value >= u / 8]
        self.count = len(rows)
        self.low = math.log10(min([u, *finite])) - 0.15
        self.high = math.log10(max([u, *finite])) + 0.25
        self.radius = 3 if len(rows) <= 40 else 1.6

    def x(self, index: int) -> float:
        return LEFT + 18 + (WIDTH - LEFT - RIGHT - 36) * index / max(1, self.count - 1)

    def y(self, error: float) -> float:
        power = self.low if error <= 0 else self.high if math.isinf(error) else math.log10(error)
        share = (min(max(power, self.low), self.high) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def point(self, index: int, error: float) -> Point:
        return self.x(index), self.y(error)


def _series(comparison: Comparison, rows: Sequence[TensorRow]) -> list[tuple[Which, str, list[float]]]:
    """(side, label, error by tensor); without an oracle the distance of the two is all there is."""
    a, b = comparison.labels
    if all(row.basis == "direct" for row in rows):
        return [("a", f"{a} to {b}", [row.direct for row in rows])]
    # Where the oracle lacks a tensor, the distance stands in for both.
    of_a = [row.direct if row.e_a is None else row.e_a for row in rows]
    of_b = [row.direct if row.e_b is None else row.e_b for row in rows]
    return [("b", b, of_b), ("a", a, of_a)]


def _axes(scale: _Scale, rows: Sequence[TensorRow]) -> list[str]:
    parts = []
    for power in range(math.ceil(scale.low), math.floor(scale.high) + 1):
        y = scale.y(10.0**power)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        digits = str(power).replace("-", "\u2212")
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">10<tspan dy="-4" font-size="8">{digits}')
        parts.append("</tspan></text>")
    for i in named(rows):
        x = scale.x(i)
        text = short_name(rows[i].module)
        text = text.removeprefix("layers.") if len(rows) > WIDE else text
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{html.escape(text)}</text>')
    if len(rows) > WIDE:
        x = (scale.x(0) + scale.x(len(rows) - 1)) / 2
        told = next((html.escape(row.module.rpartition(".")[0]) for row in rows if row.layer), "")
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 2}" text-anchor="middle">{told}, by number</text>')
    return parts


def named(rows: Sequence[TensorRow]) -> list[int]:
    """Which rows have room for their names along an axis: all, or every few layers and the ends."""
    if len(rows) <= TICKS:
        return list(range(len(rows)))
    step = math.ceil(len(rows) / TICKS)
    layers = [i for i, row in enumerate(rows) if row.layer]
    shown = layers[::step]
    last = len(rows) - 1
    return sorted({0, last} | {i for i in shown if i >= step and i <= last - step})


def _marks(scale: _Scale, rows: Sequence[TensorRow], comparison: Comparison) -> list[str]:
    """A ring around every error that fails, and a line where the failing begins."""
    parts = []
    for i, row in enumerate(rows):
        if row.verdict == "FAIL":
            worse = row.direct if row.e_a is None or row.e_b is None else max(row.e_a, row.e_b)
            x, y = scale.point(i, worse)
            parts.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="{scale.radius + 3}"/>')
    names = [row.name for row in rows]
    if comparison.divergence and comparison.divergence.tensor in names:
        x = scale.x(names.index(comparison.divergence.tensor))
        anchor, dx = ("start", 6) if x < WIDTH / 2 else ("end", -6)
        parts.append(f'<path class="mark" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="mark-text" x="{x + dx:.1f}" y="{TOP - 6}" text-anchor="{anchor}">')
        parts.append(f"first over: {html.escape(short_name(comparison.divergence.module))}</text>")
    return parts


def _spread(labels: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Move labels at the right edge apart so that none covers another."""
    out: list[tuple[float, str, str]] = []
    for y, css, text in sorted(labels):
        out.append((max(y, out[-1][0] + 14) if out else y, css, text))
    over = max(0.0, out[-1][0] - (HEIGHT - BOTTOM)) if out else 0.0
    return [(y - over, css, text) for y, css, text in out]


def _points(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
