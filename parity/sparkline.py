"""A comparison at a glance: one bar for each tensor, as high as the share of its limit that it uses."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from parity.chart import short_name
from parity.comparison import Comparison
from parity.comparison_text import times
from parity.heat import LEVELS

WIDTH, HEIGHT, TOP, BOTTOM, RIGHT = 720, 104, 16, 18, 56
NAMES = 12  # along the axis, at most
WIDEST = 26.0
MOST = 1e9  # what is not finite is drawn so high
CAPTION = "Share of its limit that each tensor uses, in the order of computation. A bar over the line fails."


def sparkline(comparison: Comparison) -> str:
    """The bars of one comparison, with their caption; empty when nothing was judged."""
    rows = [row for row in comparison.rows if row.verdict != "SKIP"]
    shares = [1 - min(row.margin, row.token_margin) for row in rows]
    return bars([row.name for row in rows], shares, CAPTION)


def bars(names: Sequence[str], shares: Sequence[float], caption: str) -> str:
    """One bar for each tensor: up to the line as high as its share, above it by the logarithm; empty without any."""
    if not names:
        return ""
    shares = [min(share, MOST) if not math.isnan(share) else MOST for share in shares]
    scale = _Scale(len(names), max(shares))
    parts = [f'<path class="lid" d="M0 {scale.y(1):.1f}H{scale.end + 4:.1f}"/>']
    parts.append(f'<text class="lid-text" x="{scale.end + 8:.1f}" y="{scale.y(1) + 4:.1f}">limit</text>')
    for index, (name, share) in enumerate(zip(names, shares, strict=True)):
        x, y = scale.x(index), scale.y(share)
        level = sum(share > edge for edge in LEVELS)
        told = f"{html.escape(name)}: {told_share(share)}"
        parts.append(
            f'<path class="h{level}" d="M{x:.1f} {HEIGHT - BOTTOM}V{y:.1f}h{scale.bar:.1f}V{HEIGHT - BOTTOM}z">'
            f"<title>{told}</title></path>"
        )
    parts += _texts(names, shares, scale)
    label = html.escape(f"{caption} Highest: {told_share(max(shares))} at {names[shares.index(max(shares))]}.")
    width = round(scale.end + RIGHT)  # few bars are drawn small, not stretched
    return (
        f'<div class="spark"><svg viewBox="0 0 {width} {HEIGHT}" style="max-width:{width}px" role="img"'
        f' aria-label="{label}">{"".join(parts)}</svg>'
        f'<p class="key">{html.escape(caption)}</p></div>'
    )


def told_share(share: float) -> str:
    """A share in words: percent below the limit, times above it."""
    if share >= MOST:
        return "not finite"
    return f"{share:.0%} of its limit" if share <= 1 else f"{times(share)} times its limit"


class _Scale:
    """From (index, share) to pixels: what is within the limit has half of the height, or all but a little of it."""

    def __init__(self, count: int, highest: float) -> None:
        self.step = min(WIDEST + 6, (WIDTH - RIGHT) / count)
        self.end = max(count * self.step, 120.0)
        self.bar = max(self.step * 0.82, 0.8)
        self.line = 0.5 if highest > 1 else 0.85
        self.decades = max(1.0, math.log10(max(highest, 1)))

    def x(self, index: int) -> float:
        return index * self.step

    def y(self, share: float) -> float:
        above = 0.15 + 0.85 * math.log10(share) / self.decades if share > 1 else 0.0  # over is seen to be over
        part = self.line * min(share, 1.0) + (1 - self.line) * above
        return HEIGHT - BOTTOM - max(part, 0.02) * (HEIGHT - TOP - BOTTOM)


def _texts(names: Sequence[str], shares: Sequence[float], scale: _Scale) -> list[str]:
    """Names along the axis, and over the highest bar how high it is."""
    every = -(-len(names) * 44 // int(max(scale.step * len(names), 1))) if scale.step < 44 else 1
    every = max(every, -(-len(names) // NAMES) if len(names) > NAMES else 1)
    parts = []
    for index in range(0, len(names), every):
        x = scale.x(index) + scale.bar / 2
        parts.append(
            f'<text x="{max(x, 18):.1f}" y="{HEIGHT - 4}" text-anchor="middle">{short_name(names[index])}</text>'
        )
    worst = max(shares)
    index = list(shares).index(worst)
    x = min(max(scale.x(index) + scale.bar / 2, 20), scale.end - 20)
    text = "not finite" if worst >= MOST else f"{worst:.0%}" if worst <= 1 else f"{times(worst)}x"
    css = "mark-text" if worst > 1 else "calm"
    parts.append(f'<text class="{css}" x="{x:.1f}" y="{scale.y(worst) - 4:.1f}" text-anchor="middle">{text}</text>')
    return parts
