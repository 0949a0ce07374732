"""Errors by layer as an inline SVG: both backends on a log scale, the limit they had to stay under, and the lid."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from parity.comparison import Comparison
from parity.findings import TensorRow

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 54, 104, 16, 34
TICKS = 14  # names along the axis, at most
Point = tuple[float, float]


def error_chart(comparison: Comparison) -> str:
    """The chart of one comparison; empty without a tensor that was judged."""
    rows = [row for row in comparison.rows if row.verdict != "SKIP"]
    if not rows or comparison.limits is None:
        return ""
    scale = _Scale(rows, comparison.limits.u)
    series = _series(comparison, rows)
    limits = [scale.point(i, row.limit) for i, row in enumerate(rows)]
    lid_y = scale.y(rows[0].lid if rows[0].basis == "oracle" else rows[0].limit)
    area = [(scale.x(0), scale.y(0)), *limits, (scale.x(len(rows) - 1), scale.y(0))]
    parts = [f'<polygon class="area" points="{_points(area)}"/>', *_axes(scale, rows)]
    parts.append(f'<path class="lid" d="M{LEFT} {lid_y:.1f}H{WIDTH - RIGHT}"/>')
    parts.append(f'<polyline class="limit" points="{_points(limits)}"/>')
    labels = [(lid_y, "lid-text", "lid"), (limits[-1][1], "limit-text", "limit")]
    for key, label, values in series:
        points = [scale.point(i, value) for i, value in enumerate(values)]
        parts.append(f'<polyline class="e{key}" points="{_points(points)}"/>')
        parts += [
            f'<circle class="p{key}" cx="{x:.1f}" cy="{y:.1f}" r="{scale.radius}"><title>{html.escape(label)} at'
            f" {html.escape(row.name)}: {value:.3g}, limit {row.limit:.3g}</title></circle>"
            for (x, y), row, value in zip(points, rows, values, strict=True)
        ]
        labels.append((points[-1][1], f"l{key}", label))
    parts += _marks(scale, rows, comparison)
    parts += [
        f'<text class="{css}" x="{WIDTH - RIGHT + 8}" y="{y + 4:.1f}">{html.escape(text[:16])}</text>'
        for y, css, text in _spread(labels)
    ]
    title = html.escape(f"Relative error by tensor of {' and '.join(comparison.labels)}, log scale")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'


def chart_key(comparison: Comparison) -> str:
    """What the chart shows, for those who see it for the first time."""
    limits = comparison.limits
    if limits is None:
        return ""
    if all(row.basis == "direct" for row in comparison.rows):
        what = "Distance of the two, relative (log scale), after each decoder layer. Without an oracle it may be up to"
        what += " twice what a correct backend can be off."
    else:
        what = "Distance from the float64 oracle, relative (log scale), after each decoder layer. Green, limit:"
        what += f" {limits.k:g}x the other's error. Dashed, lid: no correct {comparison.dtype} backend is so far off."
    return f'<p class="key">{html.escape(what)} Ringed: over its limit, or one of its tokens is.</p>'


class _Scale:
    """From (index of a tensor, error) to pixels; what is too small or not finite is drawn at the edge."""

    def __init__(self, rows: Sequence[TensorRow], u: float) -> None:
        errors = [value for row in rows for value in (row.e_a, row.e_b, row.direct, row.limit, row.lid) if value]
        finite = [value for value in errors if math.isfinite(value) and value >= u / 8]
        self.count = len(rows)
        self.low = math.log10(min([u, *finite])) - 0.15
        self.high = math.log10(max([u, *finite])) + 0.25
        self.radius = 3 if len(rows) <= 40 else 1.6

    def x(self, index: int) -> float:
        return LEFT + 12 + (WIDTH - LEFT - RIGHT - 24) * index / max(1, self.count - 1)

    def y(self, error: float) -> float:
        power = self.low if error <= 0 else self.high if math.isinf(error) else math.log10(error)
        share = (min(max(power, self.low), self.high) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def point(self, index: int, error: float) -> Point:
        return self.x(index), self.y(error)


def _series(comparison: Comparison, rows: Sequence[TensorRow]) -> list[tuple[str, str, list[float]]]:
    """(a or b, label, error by tensor); without an oracle the distance of the two is all there is."""
    if all(row.basis == "direct" for row in rows):
        return [("a", "a to b", [row.direct for row in rows])]
    a, b = comparison.labels
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
    step = max(1, math.ceil(len(rows) / TICKS))
    after = next((i for i, row in enumerate(rows) if row.layer is None), len(rows))
    shown = set(range(0, after, step)) if after > TICKS else set(range(after))
    shown = {i for i in shown if i <= after - max(1, step // 2) or i == 0} | {len(rows) - 1}
    shown |= set(range(len(rows))) if len(rows) <= TICKS else set()
    for i in sorted(shown):
        x = scale.x(i)
        text = short_name(rows[i].name)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{text}</text>')
    return parts


def short_name(name: str) -> str:
    """A tensor's name along an axis: the layer's number where it has one."""
    short = {"hidden_states.0": "embed", "final_hidden_state": "norm", "logits": "logits"}
    return html.escape(short.get(name, name.removeprefix("hidden_states.")))


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
        parts.append(f'<text class="mark-text" x="{x + dx:.1f}" y="{TOP + 6}" text-anchor="{anchor}">')
        parts.append(f"first: {short_name(comparison.divergence.tensor)}</text>")
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
