"""A comparison for a terminal or a log."""

from __future__ import annotations

import textwrap

from parity.comparison import Comparison
from parity.findings import Generated, Routing, TensorRow, Top1

WIDTH = 110
ROWS_SHOWN = 24  # of a deep model; those that pass in between are counted


def render(comparison: Comparison) -> str:
    """The sentence first, then the tensors that matter, then the tokens, then what else a reader should know."""
    head = comparison.verdict + (f" ({comparison.cause})" if comparison.cause else "")
    blocks = [textwrap.fill(f"{head}: {comparison.summary}", WIDTH, break_on_hyphens=False)]
    if comparison.rows:
        blocks.append(tensor_table(comparison))
    facts = [_top1(comparison, count) for count in comparison.top1]
    facts += [_generated(comparison.generated)] if comparison.generated else []
    facts += [_routing(comparison, comparison.routing)] if comparison.routing else []
    facts += _weights(comparison)
    facts += _alike(comparison)
    facts += [f"note       {note}" for note in comparison.notes]
    if facts:
        blocks.append("\n".join(textwrap.fill(fact, WIDTH, subsequent_indent=" " * 11) for fact in facts))
    if comparison.commands:  # one to a line, to be copied
        blocks.append("\n".join(f"to see it  {command}" for command in comparison.commands))
    return "\n\n".join(blocks)


def number(value: float | None) -> str:
    """An error in three digits; nothing where there is none."""
    return "-" if value is None else "0" if value == 0 else f"{value:.2e}"


def times(factor: float) -> str:
    """A factor in three digits, without powers of ten."""
    return f"{factor:.3g}" if factor < 1000 else f"{factor:,.0f}"


def tensor_table(comparison: Comparison, *, everything: bool = False) -> str:
    """Tensors in columns; of a deep model those that matter, unless everything is asked for."""
    a, b = comparison.labels
    head = ["tensor", f"e({a})", f"e({b})", "a to b", "ratio", "limit", "margin", "token", ""]
    shown = set(range(len(comparison.rows))) if everything else _shown(comparison.rows)
    lines = [head]
    for index, row in enumerate(comparison.rows):
        if index in shown:
            lines.append(_cells(row))
        elif index - 1 in shown:
            gap = comparison.rows[index : min((i for i in shown if i > index), default=index)]
            failing = sum(row.verdict == "FAIL" for row in gap)
            lines.append([f"  ... {len(gap)} more", *[""] * 7, f"{failing} FAIL" if failing else "PASS"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(_align(cell, widths[i], left=i in (0, 8)) for i, cell in enumerate(line)) for line in lines]
    return "\n".join(line.rstrip() for line in text)


def _shown(rows: tuple[TensorRow, ...]) -> set[int]:
    """All tensors of a shallow model; of a deep one the ends, the failing and those before them, and the tightest."""
    if len(rows) <= ROWS_SHOWN:
        return set(range(len(rows)))
    failing = [i for i, row in enumerate(rows) if row.verdict == "FAIL"][:8]
    tightest = sorted(range(len(rows)), key=lambda i: rows[i].margin)[:4]
    around = [i - 1 for i in failing if i]
    return {0, 1, *failing, *around, *tightest, *range(len(rows) - 3, len(rows))}


def _cells(row: TensorRow) -> list[str]:
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}x"
    margins = [f"{margin:.0%}" if margin > -100 else "<-9999%" for margin in (row.margin, row.token_margin)]
    last = row.verdict if row.cause is None else f"{row.verdict} {row.cause}"
    return [row.name, number(row.e_a), number(row.e_b), number(row.direct), ratio, number(row.limit), *margins, last]


def _align(cell: str, width: int, *, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def _top1(comparison: Comparison, count: Top1) -> str:
    who = {"a": comparison.labels[0], "b": comparison.labels[1], "both": "a against b"}[count.side]
    text = f"top-1      {who}: {count.agree} of {count.decidable} decidable tokens agree with the reference"
    return f"{text}; {count.ties} ties, {count.ties_agree} of them alike"


def _alike(comparison: Comparison) -> list[str]:
    found = comparison.nearest_mutant()
    names = ", ".join(f"{one.name} ({one.says}) {one.similarity:.2f}" for one in found)
    return [f"looks like {names}"] if found else []


def _weights(comparison: Comparison) -> list[str]:
    roots = [facts["root"] for facts in comparison.meta[:2] if facts.get("root")]
    return [f"weights    root {roots[0][:16]} in both"] if len(roots) == 2 and roots[0] == roots[1] else []


def _generated(found: Generated) -> str:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in found.counts.items())
    where = f"; first difference at row {found.first[0]}, step {found.first[1]}" if found.first else ""
    return f"generated  {found.rows} rows of {found.steps} tokens: {counts}{where}"


def _routing(comparison: Comparison, routing: Routing) -> str:
    sides = zip(comparison.labels, (routing.flips_a, routing.flips_b), strict=True)
    against = "".join(f", {flips} {label} against its oracle" for label, flips in sides if flips is not None)
    kept = f"{routing.tokens - routing.excluded} of {routing.tokens} tokens judged"
    return f"routing    flips in {routing.layer_tokens} layer-tokens: {routing.between} a against b{against}; {kept}"
