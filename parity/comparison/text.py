"""A comparison for a terminal or a log."""

from __future__ import annotations

import textwrap

from parity.comparison.findings import Generated, Routing, TensorRow, Top1
from parity.comparison.nearest import resemblance
from parity.comparison.outcome import Comparison
from parity.wording import cause_word, number, printable, share

WIDTH = 110
ROWS_SHOWN = 24  # of a deep model; those that pass in between are counted


def render(comparison: Comparison) -> str:
    """The sentence first, then the tensors that matter, then the tokens, then what else a reader should know."""
    blocks = [textwrap.fill(f"{comparison.kind}: {comparison.summary}", WIDTH, break_on_hyphens=False)]
    if comparison.experiment:
        blocks.insert(0, textwrap.fill(f"Experiment: {comparison.experiment}", WIDTH, break_on_hyphens=False))
    if comparison.commands:  # one to a line, to be copied
        blocks.append("\n".join(f"next       {printable(command)}" for command in comparison.commands))
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
    return "\n\n".join(blocks)


def tensor_table(comparison: Comparison, *, everything: bool = False) -> str:
    """Tensors in columns; of a deep model those that matter, unless everything is asked for."""
    a, b = comparison.labels
    head = ["output of", f"e({a})", f"e({b})", f"{a} to {b}", "limit", "used", "worst token", ""]
    shown = set(range(len(comparison.rows))) if everything else _shown(comparison.rows)
    lines = [head]
    for index, row in enumerate(comparison.rows):
        if index in shown:
            lines.append(_cells(row))
        elif index - 1 in shown:
            gap = comparison.rows[index : min((i for i in shown if i > index), default=index)]
            failing = sum(row.verdict == "FAIL" for row in gap)
            lines.append([f"  ... {len(gap)} more", *[""] * 6, f"{failing} FAIL" if failing else "PASS"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(_align(cell, widths[i], left=i in (0, 7)) for i, cell in enumerate(line)) for line in lines]
    return "\n".join(line.rstrip() for line in text)


def _shown(rows: tuple[TensorRow, ...]) -> set[int]:
    """All tensors of a shallow model; of a deep one the ends, the failing and those before them, and the tightest."""
    if len(rows) <= ROWS_SHOWN:
        return set(range(len(rows)))
    failing = [i for i, row in enumerate(rows) if row.verdict == "FAIL"][:8]
    tightest = sorted(range(len(rows)), key=lambda i: -rows[i].used)[:4]
    around = [i - 1 for i in failing if i]
    return {0, 1, *failing, *around, *tightest, *range(len(rows) - 3, len(rows))}


def _cells(row: TensorRow) -> list[str]:
    word = cause_word(row.cause)
    errors = [number(value) for value in (row.e_a, row.e_b, row.direct, row.limit)]
    return [row.module, *errors, share(1 - row.margin), share(1 - row.token_margin), f"{row.verdict} {word}".rstrip()]


def _align(cell: str, width: int, *, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def _top1(comparison: Comparison, count: Top1) -> str:
    a, b = comparison.labels
    who = {"a": a, "b": b, "both": f"{a} and {b}"}[count.side]
    picks = "pick the same top-1" if count.side == "both" else "picks the oracle's top-1"
    ties = f": {count.ties}, of which {count.ties_agree} alike" if count.ties else ""
    return f"top-1      {who}: {picks} for {count.agree} of {count.decidable} tokens (near-ties left out{ties})"


def _alike(comparison: Comparison) -> list[str]:
    return [f"alike      {resemblance(comparison.profile, comparison.parts)}"] if comparison.profile else []


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
    flips = f"{routing.between} between the two{against}"
    return f"routing    flips in {routing.layer_tokens} layer-tokens: {flips}; {kept}"
