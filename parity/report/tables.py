"""The tables of the report that are looked up rather than looked at: flags, tensors, constants."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from parity.bisection import Bisection, columns
from parity.comparison.findings import TensorRow
from parity.comparison.outcome import Comparison
from parity.report.style import framed
from parity.ruler import REASONS
from parity.wording import cause_word, number, share, shown

esc = html.escape
ABSENT = "\u2013"
HOW_TO_READ = (
    "Each line is what a module hands on. Errors are relative L2 distances from the float64 oracle, over the tokens"
    " that count. Used: the share of the limit, in percent or, where it is exceeded, in times; for the whole, and for"
    " its worst token (row, position), whose limit is a single token's own and wider. The limit is"
    " that of the side nearer to its own."
)


def flags_tables(comparison: Comparison) -> str:
    """What each side ran on, side by side: the arithmetic in sight, with differences tinted, and the rest folded."""
    if len(comparison.meta) < 2:
        return ""
    sides = [_flat(meta) for meta in comparison.meta[:2]]
    lines: tuple[list[str], list[str]] = ([], [])
    tinted = 0
    for key in sorted({*sides[0], *sides[1]}, key=_order):
        values = [side.get(key, ABSENT) for side in sides]
        shared = key.startswith("precision.") or key in ("dtype", "root", "input_hash", "shape")
        differs = shared and values[0] != values[1] and ABSENT not in values
        cells = "".join(f'<td class="mono">{esc(value)}</td>' for value in values)
        folded = not (differs or key in ("device", "dtype") or key.startswith("precision."))
        tinted += differs
        lines[folded].append(f'<tr class="{"differs" if differs else ""}"><td>{esc(key)}</td>{cells}</tr>')
    head = "".join(f"<th>{esc(label)}</th>" for label in comparison.labels)
    visible, rest = (
        f'<div class="scroll"><table class="pair"><tr><th></th>{head}</tr>{"".join(part)}</table></div>'
        for part in lines
    )
    return (
        f'<div class="flags"><h3>Arithmetic{"; what differs is tinted" if tinted else ""}</h3>{visible}</div>'
        f"<details><summary>Versions, checkpoint, digests</summary>{rest}</details>"
    )


def _order(key: str) -> tuple[int, str]:
    groups = ("backend", "device", "dtype", "precision.", "versions.", "checkpoint", "shape", "root", "input_hash")
    return next((i for i, group in enumerate(groups) if key.startswith(group)), len(groups)), key


def _flat(meta: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as text by dotted name; digests by their first digits."""
    out: dict[str, str] = {}
    for key, value in meta.items():
        if isinstance(value, dict):
            out |= {f"{key}.{name}": str(item) for name, item in value.items()}
        elif value not in (None, "", []):
            out[key] = str(value)[: 16 if key in ("root", "input_hash") else 200]
    return out


def tensor_table(comparison: Comparison) -> str:
    """Every tensor, folded away."""
    return (
        f"<details><summary>All {len(comparison.rows)} modules in numbers</summary>{tensor_rows(comparison)}</details>"
    )


def tensor_rows(comparison: Comparison) -> str:
    """A line for every tensor."""
    a, b = map(esc, comparison.labels)
    heads = (f"error of {a}", f"error of {b}", f"{a} to {b}", "limit", "used", "worst token", "of its own limit")
    head = "".join(f'<th class="num">{name}</th>' for name in heads)
    lines = "".join(_tensor_line(row) for row in comparison.rows)
    table = f'<div class="scroll"><table><tr><th>output of</th>{head}<th></th></tr>{lines}</table></div>'
    return f"{table}<p class='key'>{esc(HOW_TO_READ)}</p>"


def probes_table(comparison: Comparison) -> str:
    """Every place where the oracle tried a fault: what the traces hold of it, and the least that would have failed."""
    a, b = map(esc, comparison.labels)
    heads = (f"{a} holds", f"{b} holds", "give or take", "seen from", "by its size alone from")
    head = "".join(f'<th class="num">{name}</th>' for name in heads)
    lines = []
    for probe in comparison.probes:
        held = (probe.factor_a, probe.factor_b, probe.deviation)
        cells = [ABSENT if value is None else f"{100 * value:.3f} %" for value in held]
        cells += [shown(probe.least), shown(probe.least_by_size)]
        numbers = "".join(f'<td class="num">{cell}</td>' for cell in cells)
        kind = "1 % too large" if probe.kind == "scale" else "noise of 1 %"
        bad = ' class="bad"' if probe.cause or not probe.is_seen else ""
        lines.append(f"<tr{bad}><td><code>{esc(probe.module)}</code></td><td>{kind}</td>{numbers}</tr>")
    table = f'<div class="scroll"><table><tr><th>weight</th><th>fault</th>{head}</tr>{"".join(lines)}</table></div>'
    seen = sum(probe.is_seen for probe in comparison.probes)
    told = f"Weights 1 % off, tried by the oracle: {seen} of {len(lines)} would have been seen"
    if comparison.verdict == "FAIL":  # beside a failure nobody asks what else would show, but how much of each it holds
        told = f"Weights 1 % off, {len(lines)} tried by the oracle: how much of each the traces hold"
    return f"<details><summary>{told}</summary>{table}</details>"


def _tensor_line(row: TensorRow) -> str:
    token = f"{row.worst_token.row}, {row.worst_token.position}" if row.worst_token else ""
    values = [number(row.e_a), number(row.e_b), number(row.direct), number(row.limit)]
    values += [share(1 - row.margin), token, share(1 - row.token_margin)]
    cells = "".join(f'<td class="num">{value}</td>' for value in values)
    last = esc(row.nonfinite or cause_word(row.cause) or row.verdict.lower())
    bad = ' class="bad"' if row.verdict == "FAIL" else ""
    return f"<tr{bad}><td><code>{esc(row.module)}</code></td>{cells}<td>{last}</td></tr>"


def constants_table(comparison: Comparison) -> str:
    """The constants in force, with the reason for each: nobody should have to trust a number."""
    limits = comparison.limits
    if limits is None:
        return ""
    values = {"u": limits.u, "k": limits.k, "k_token": limits.k_token, "c": limits.c}
    lines = "".join(
        f"<tr><td><code>{k}</code></td><td>{number(v)}</td><td>{esc(REASONS[k])}</td></tr>" for k, v in values.items()
    )
    how = "e(x) = \u2016x \u2212 oracle\u2016 / \u2016oracle\u2016 must stay under k \u00b7 max(e(other), u) and under"
    how += f" the absolute limit c \u00b7 u \u00b7 \u221aL, L = {comparison.num_layers}, {esc(comparison.dtype)}."
    return f"<details><summary>The ruler</summary><p class='key'>{how}</p><table>{lines}</table></details>"


def bisection_tables(found: Bisection) -> str:
    """What a bisection found, for a notebook: the sentence, and from the model down each step by itself."""
    tables = []
    for name, steps in found.tables:
        head, *rows = zip(*columns(steps, found.names, name), strict=True)
        bad = [' class="bad"' if step.blame else "" for step in steps]
        lines = "".join(f"<tr{mark}>{_cells('td', row)}</tr>" for mark, row in zip(bad, rows, strict=True))
        table = f'<div class="scroll"><table><tr>{_cells("th", head)}</tr>{lines}</table></div>'
        tables.append(f"<h3>{esc(name)}</h3>{table}")
    notes = "".join(f"<li>{esc(note)}</li>" for note in found.notes)
    tone = "pass" if found.culprit is None else "fail"
    notes = f'<ul class="notes">{notes}</ul>' if notes else ""
    return framed(f'<div class="banner {tone}"><p>{esc(found.summary)}</p></div>{notes}{"".join(tables)}')


def _cells(tag: str, texts: Sequence[str]) -> str:
    """A line of a table whose first column is text and whose others are numbers."""
    first, *rest = texts
    return f"<{tag}>{esc(first)}</{tag}>" + "".join(f'<{tag} class="num">{esc(text)}</{tag}>' for text in rest)
