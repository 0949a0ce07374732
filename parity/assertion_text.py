"""What a failed assertion says: about ten lines, of which the first three are enough for most people."""

from __future__ import annotations

import textwrap

from parity.comparison import Comparison
from parity.comparison_text import number
from parity.findings import Divergence, TensorRow, Top1

WIDTH = 110
INDENT = 11
REASONS_SHOWN = 4
BARS = "▁▂▃▄▅▆▇█"  # the lower half is under the limit, the upper half over it, a step for every doubling


def failure(comparison: Comparison, reproduce: str) -> str:
    """Verdict, where it begins and at which token, local or inherited, every layer as a bar, what reproduces it.

    Args:
        comparison: any; also one that passes.
        reproduce: a command.
    """
    head = comparison.verdict + (f" ({comparison.cause})" if comparison.cause else "")
    blocks = [textwrap.fill(f"parity {head}: {comparison.summary}", WIDTH, break_on_hyphens=False)]
    lines = [*_first(comparison), *_layers(comparison), *(_top1(comparison, count) for count in comparison.top1)]
    if len(comparison.reasons) > 1:
        lines += [("because", reason) for reason in comparison.reasons[:REASONS_SHOWN]]
    lines.append(("reproduce", reproduce))
    return "\n".join(blocks + [_line(name, text) for name, text in lines])


def bar(used: float) -> str:
    """One character for the share of a limit that is used; above 1 fails."""
    if used != used or used == float("inf"):
        return BARS[-1]
    step = 3 if used > 0.5 else 2 if used > 0.25 else 1 if used > 0.125 else 0
    step = step if used <= 1 else 4 + (used > 2) + (used > 8) + (used > 64)
    return BARS[step]


def used(row: TensorRow) -> float:
    """The share of its limit that a tensor uses, by the worst of itself and its worst token."""
    return 1 - min(row.margin, row.token_margin)


def _line(name: str, text: str) -> str:
    filled = f"{name:<{INDENT}}{text}"
    if name in ("reproduce", "layers"):  # to be copied, or aligned
        return filled
    return textwrap.fill(filled, WIDTH, subsequent_indent=" " * INDENT, break_on_hyphens=False)


def _first(comparison: Comparison) -> list[tuple[str, str]]:
    found = comparison.divergence
    if found is None:
        return []
    layer = "" if found.layer is None else " (embeddings)" if found.layer == 0 else f" (decoder layer {found.layer})"
    suspect = f"; look at {found.suspect}" if found.suspect and found.suspect != found.tensor else ""
    return [
        ("first", f"{found.tensor}{layer}, row {found.row}, token {found.position}{suspect}"),
        ("error", f"{_whose(comparison, found)}{_growth(found)}"),
    ]


def _whose(comparison: Comparison, found: Divergence) -> str:
    names = {"a": comparison.labels[0], "b": comparison.labels[1]}
    return f"of {names[found.side]}, " if found.side in names else "between the two, "


def _growth(found: Divergence) -> str:
    where = "local" if found.local > found.inherited else "inherited"
    return (
        f"{number(found.before)} before, {number(found.after)} after: {number(found.local)} local,"
        f" {number(found.inherited)} inherited, so {where} (grew {found.growth:.3g}x, usual {found.usual_growth:.3g}x)"
    )


def _layers(comparison: Comparison) -> list[tuple[str, str]]:
    rows = [row for row in comparison.rows if row.verdict != "SKIP"]
    if not rows:
        return []
    worst = max(rows, key=used)
    bars = "".join(bar(used(row)) for row in rows)
    names = f"{rows[0].name} ... {rows[-1].name}" if len(rows) > 1 else rows[0].name
    text = f"{bars}  error over limit, {names}; largest {used(worst):.3g}x at {worst.name}"
    return [("layers", text)]


def _top1(comparison: Comparison, count: Top1) -> tuple[str, str]:
    who = {"a": comparison.labels[0], "b": comparison.labels[1], "both": "a against b"}[count.side]
    return "top-1", f"{who}: {count.agree} of {count.decidable} decidable tokens agree, {count.ties} ties"
