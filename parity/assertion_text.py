"""What a failed assertion says: about ten lines, of which the first three are enough for most people."""

from __future__ import annotations

import textwrap

from parity.comparison.findings import Divergence, Top1
from parity.comparison.nearest import outstanding
from parity.comparison.outcome import Comparison
from parity.wording import number, share, times

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
    blocks = [textwrap.fill(f"parity {comparison.kind}: {comparison.summary}", WIDTH, break_on_hyphens=False)]
    lines = [*_first(comparison), *_layers(comparison), *(_top1(comparison, count) for count in comparison.top1)]
    if alike := outstanding(comparison.nearest_mutant()):
        pattern = f"a {alike.similarity:.0%} match (100%: the same)"
        lines.append(("alike", f"most resembles the known bug pattern {alike.name} ({alike.says}): {pattern}"))
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


def _line(name: str, text: str) -> str:
    filled = f"{name:<{INDENT}}{text}"
    if name in ("reproduce", "layers"):  # to be copied, or aligned
        return filled
    return textwrap.fill(filled, WIDTH, subsequent_indent=" " * INDENT, break_on_hyphens=False)


def _first(comparison: Comparison) -> list[tuple[str, str]]:
    found = comparison.divergence
    if found is None:
        return []
    suspect = f"; look at {found.suspect_module}" if found.suspect_module not in (None, found.module) else ""
    return [
        ("first", f"{found.module}, row {found.row}, position {found.position}{suspect}"),
        ("error", f"{_whose(comparison, found)}{_growth(found)}"),
    ]


def _whose(comparison: Comparison, found: Divergence) -> str:
    names = {"a": comparison.labels[0], "b": comparison.labels[1]}
    return f"of {names[found.side]}, " if found.side in names else "between the two, "


def _growth(found: Divergence) -> str:
    where = "local" if found.local > found.inherited else "inherited"
    return (
        f"{number(found.before)} before, {number(found.after)} after: {number(found.local)} local,"
        f" {number(found.inherited)} inherited, so {where} (grew {times(found.growth)}x, usual"
        f" {times(found.usual_growth)}x)"
    )


def _layers(comparison: Comparison) -> list[tuple[str, str]]:
    rows = [row for row in comparison.rows if row.verdict != "SKIP"]
    worst = comparison.worst_row
    if worst is None:
        return []
    bars = "".join(bar(row.used) for row in rows)
    names = f"{rows[0].module} ... {rows[-1].module}" if len(rows) > 1 else rows[0].module
    text = f"{bars}  share of the limit used, {names}; {share(worst.used)} at {worst.module}"
    return [("layers", text)]


def _top1(comparison: Comparison, count: Top1) -> tuple[str, str]:
    a, b = comparison.labels
    who = {"a": f"{a} picks the oracle's", "b": f"{b} picks the oracle's", "both": f"{a} and {b} pick the same"}
    what = f"{count.agree} of {count.decidable} tokens, {count.ties} near-ties left out"
    return "top-1", f"{who[count.side]} for {what}"
