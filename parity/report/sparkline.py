"""A comparison at a glance: one bar for each tensor, as high as the share of its limit that it uses."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from parity.comparison.outcome import Comparison
from parity.report.heat import LEVELS
from parity.wording import MOST, share, short_name, times, told_share

WIDTH, HEIGHT, TOP, BOTTOM, RIGHT = 720, 120, 18, 18, 84
NAMES = 12  # along the axis, at most
WIDEST = 72.0
ROOM = 76  # pixels that a name needs
LEADING = 13.0  # from a number to the one above it
CAPTION = "Share of its limit that each module's result uses, in the order of computation. A bar over the line fails."
ABOVE = " Above the line heights are logarithmic: a step for every power of ten."


def sparkline(comparison: Comparison) -> str:
    """The bars of one comparison, with their caption; empty when nothing was judged."""
    rows = [row for row in comparison.rows if row.verdict != "SKIP"]
    marked = rows.index(comparison.worst_row) if comparison.worst_row in rows else None
    return bars([row.module for row in rows], [row.used for row in rows], CAPTION, marked)


def bars(names: Sequence[str], shares: Sequence[float], caption: str, marked: int | None = None) -> str:
    """One bar for each tensor: up to the line as high as its share, above it by the logarithm; empty without any.

    ``marked``: the bar that has its share written over it; None: the highest.
    """
    if not names:
        return ""
    drawn = [min(one, MOST) if not math.isnan(one) else MOST for one in shares]
    scale = _Scale(len(names), max(drawn))
    parts = [f'<path class="edge" d="M0 {scale.y(1):.1f}H{scale.end + 4:.1f}"/>']
    parts.append(f'<text class="edge-text" x="{scale.end + 8:.1f}" y="{scale.y(1) + 4:.1f}">limit</text>')
    parts += scale.ticks()
    for index, (name, one) in enumerate(zip(names, shares, strict=True)):
        x, y = scale.x(index), scale.y(drawn[index])
        level = sum(drawn[index] > edge for edge in LEVELS)
        told = f"{html.escape(name)}: {told_share(one)}"
        parts.append(
            f'<path class="h{level}" d="M{x:.1f} {HEIGHT - BOTTOM}V{y:.1f}h{scale.bar:.1f}V{HEIGHT - BOTTOM}z">'
            f"<title>{told}</title></path>"
        )
    highest = drawn.index(max(drawn))
    parts += _texts(names, shares, drawn, scale, highest if marked is None else marked)
    caption += ABOVE if drawn[highest] > 1 else ""
    label = html.escape(f"{caption} Highest: {told_share(shares[highest])} at {names[highest]}.")
    width = round(scale.end + RIGHT)  # few bars are drawn small, not stretched
    return (
        f'<div class="spark"><svg viewBox="0 0 {width} {HEIGHT}" style="max-width:{width}px" role="img"'
        f' aria-label="{label}">{"".join(parts)}</svg>'
        f'<p class="key">{html.escape(caption)}</p></div>'
    )


class _Scale:
    """From (index, share) to pixels: what is within the limit has half of the height, or all but a little of it."""

    def __init__(self, count: int, highest: float) -> None:
        self.step = min(WIDEST + 6, (WIDTH - RIGHT) / count)
        self.end = max(count * self.step, 120.0)
        self.bar = max(self.step * 0.82, 0.8)
        self.line = 0.5 if highest > 1 else 0.85
        self.decades = max(1.0, math.log10(max(highest, 1)))

    def ticks(self) -> list[str]:
        """Numbers beside the bars: zero and, where any is over the limit, powers of ten above it."""
        heights = {"0": HEIGHT - BOTTOM}
        powers = range(1, math.floor(self.decades + 1e-9) + 1) if self.line < 0.8 else ()
        every = math.ceil(LEADING / ((self.y(1) - TOP) * 0.85 / self.decades))
        heights |= {f"{times(10.0**power)}x": self.y(10.0**power) for power in powers[every - 1 :: every]}
        end = self.end
        return [
            f'<path class="grid" d="M{end:.1f} {y:.1f}h4"/><text x="{end + 8:.1f}" y="{y + 4:.1f}">{text}</text>'
            for text, y in heights.items()
        ]

    def x(self, index: int) -> float:
        return index * self.step

    def y(self, share: float) -> float:
        above = 0.15 + 0.85 * math.log10(share) / self.decades if share > 1 else 0.0  # over is seen to be over
        part = self.line * min(share, 1.0) + (1 - self.line) * above
        return HEIGHT - BOTTOM - max(part, 0.02) * (HEIGHT - TOP - BOTTOM)


def _texts(
    names: Sequence[str], shares: Sequence[float], drawn: Sequence[float], scale: _Scale, marked: int
) -> list[str]:
    """Names along the axis, and over the marked bar how high it is."""
    every = -(-len(names) * ROOM // int(max(scale.step * len(names), 1))) if scale.step < ROOM else 1
    every = max(every, -(-len(names) // NAMES) if len(names) > NAMES else 1)
    parts = []
    for index in range(0, len(names), every):
        x, anchor = scale.x(index) + scale.bar / 2, "middle"
        if x < ROOM / 2:  # whatever the font makes of a name, it begins where the picture does
            x, anchor = 0.0, "start"
        elif x < 1.4 * ROOM:  # the first name may be this long
            continue
        name = html.escape(short_name(names[index]))
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 4}" text-anchor="{anchor}">{name}</text>')
    worst = drawn[marked]
    x = min(max(scale.x(marked) + scale.bar / 2, 24), scale.end - 24)
    text = share(shares[marked])
    css = "mark-text" if worst > 1 else "calm"
    parts.append(f'<text class="{css}" x="{x:.1f}" y="{scale.y(worst) - 4:.1f}" text-anchor="middle">{text}</text>')
    return parts
