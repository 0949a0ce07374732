"""The sections of the report: lifecycle timeline, and everything about one comparison."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from parity.chart import chart_key, error_chart
from parity.comparison import Comparison
from parity.comparison_text import number
from parity.events import ROOT_SHOWN, EventResult, timeline
from parity.findings import Divergence
from parity.heat import heat_map
from parity.report_tables import constants_table, flags_tables, probes_table, tensor_table
from parity.sparkline import sparkline
from parity.verdict import shown

esc = html.escape


def timeline_section(events: Sequence[EventResult]) -> str:
    """The lifecycle, with its heading."""
    return f'<h2>Lifecycle</h2><div class="card">{timeline_table(events)}</div>'


def timeline_table(events: Sequence[EventResult]) -> str:
    """Events by backends: green, red or grey, with the version and the weights' root after each."""
    backends, rows = timeline(events)
    head = "".join(f"<th>{esc(name)}</th>" for name in backends)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{_event_cell(row.cells[name])}</td>" for name in backends)
        lines.append(f"<tr><td>{esc(row.event)}</td>{cells}</tr>")
    table = f'<table class="timeline"><tr><th>event</th>{head}</tr>{"".join(lines)}</table>'
    key = '<p class="key">The square takes its colour from the root digest: same colour, same weights, bit for bit.</p>'
    return f'<div class="scroll">{table}</div>{key}'


def _event_cell(result: EventResult | None) -> str:
    if result is None:
        return '<div class="cell none">\u2013</div>'
    parts = [f"<b>{result.verdict}</b>"]
    parts += [f"<span>v{result.version}</span>"] if result.version is not None else []
    parts += [_root(result.root)] if result.root else []
    parts += [f'<span class="key">{result.seconds:.2f} s</span>'] if result.seconds is not None else []
    if result.detail and result.verdict != "pass":
        parts.append(f'<span class="why">{esc(result.detail)}</span>')
    return f'<div class="cell {result.verdict}" title="{esc(result.detail)}">{"".join(parts)}</div>'


def _root(root: str) -> str:
    """The first digits of a root, and a colour made from it, so that A, B, A is seen to come back."""
    hue = sum(ord(char) * (index * 37 + 11) for index, char in enumerate(root[:16])) % 360
    dot = f'<i class="dot" style="background:hsl({hue} 62% 52%)"></i>'
    return f'<span class="mono">{dot}{esc(root[:ROOT_SHOWN])}</span>'


def comparison_section(title: str, comparison: Comparison) -> str:
    """One comparison: the sentence, the chart beside the first divergence, the tokens, the counts, the tables."""
    return f'<section class="card">{_heading(title, comparison)}{_details(comparison)}</section>'


def glance(title: str, comparison: Comparison) -> str:
    """The same for a notebook: a bar for each tensor, and everything else folded."""
    more = _details(comparison)
    folded = f"<details><summary>Chart, tokens, arithmetic, tables</summary>{more}</details>" if more else ""
    return f"{_heading(title, comparison)}{sparkline(comparison)}{folded}"


def _heading(title: str, comparison: Comparison) -> str:
    tone = comparison.verdict.lower()
    pill = comparison.verdict + (f": {comparison.cause}" if comparison.cause else "")
    notes = "".join(f"<li>{esc(note)}</li>" for note in comparison.notes)
    return (
        f'<div class="head"><h2>{esc(title)}</h2><span class="pill {tone}">{esc(pill)}</span></div>'
        f'<p class="sentence">{esc(comparison.summary)}</p>'
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + _next_steps(comparison)
    )


def _details(comparison: Comparison) -> str:
    chart = error_chart(comparison)
    drawn = f'<h3>Error by tensor</h3><div class="scroll">{chart}</div>{chart_key(comparison)}'
    side = _divergence_card(comparison, comparison.divergence) if comparison.divergence else _tightest_card(comparison)
    parts = [
        f'<div class="split"><div>{drawn}</div>{side}</div>' if chart else "",
        heat_map(comparison),
        _tiles(comparison),
        flags_tables(comparison),
        tensor_table(comparison) if comparison.rows else "",
        probes_table(comparison) if comparison.probes else "",
        constants_table(comparison) if comparison.limits else "",
    ]
    return "".join(parts)


def _divergence_card(comparison: Comparison, found: Divergence) -> str:
    """Where it begins, whose it is, and how much of the error was handed down."""
    who = {"a": comparison.labels[0], "b": comparison.labels[1]}.get(found.side or "", "the two, apart")
    layer = (
        f"model.layers.{found.layer - 1}" if found.layer else "embeddings" if found.layer == 0 else "after the layers"
    )
    total = found.inherited + found.local
    share = 100 if not math.isfinite(total) or total == 0 else round(100 * found.local**2 / found.after**2)
    parts = ((share, "--fail"), (100 - share, "--h3"))
    drawn = "".join(f'<i style="width:{width}%;background:var({colour})"></i>' for width, colour in parts)
    keys = '<i class="dot" style="background:var(--fail)"></i>local '
    keys += f'{share}% &nbsp; <i class="dot" style="background:var(--h3)"></i>inherited {100 - share}% (of the square)'
    facts = {
        "worst token": f"row {found.row}, position {found.position}",
        "error before": number(found.before),
        "error after": number(found.after),
        "growth here": f"{found.growth:.3g}x",
        "growth in the others": f"{found.usual_growth:.3g}x",
        "look at": found.suspect or "no single step",
    }
    return (
        f'<div class="found fail"><h3>First divergence</h3><div class="big">{esc(found.tensor)}</div>'
        f"<p>{esc(layer)} \u00b7 {esc(who)}</p>{_dl(facts)}"
        f'<div class="bar">{drawn}</div><span class="key">{keys}</span></div>'
    )


def _tightest_card(comparison: Comparison) -> str:
    """On a pass, what came nearest to failing."""
    judged = [row for row in comparison.rows if row.verdict == "PASS"]
    if not judged:
        return ""
    row = min(judged, key=lambda row: row.margin)
    a, b = comparison.labels
    facts = {f"error of {a}": number(row.e_a), f"error of {b}": number(row.e_b), "limit": number(row.limit)}
    facts |= {"lid": number(row.lid), "limit left, worst token": f"{min(r.token_margin for r in judged):.0%}"}
    used = round(100 * (1 - row.margin))
    bar = f'<div class="bar"><i style="width:{used}%;background:var(--pass)"></i></div>'
    key = f'<span class="key">{used}% of its limit used</span>'
    return (
        f'<div class="found {comparison.verdict.lower()}"><h3>Nearest to its limit</h3>'
        f'<div class="big">{esc(row.name)}</div><p></p>{_dl(facts)}{bar}{key}</div>'
    )


def _next_steps(comparison: Comparison) -> str:
    """What it looks like, and the commands that show it again."""
    lines = [
        f"<li>looks like <b>{esc(one.name)}</b>: {esc(one.says)} ({one.similarity:.2f})</li>"
        for one in comparison.nearest_mutant()
    ]
    lines += [f"<li><code>{esc(command)}</code></li>" for command in comparison.commands]
    return f'<h3>What to look at</h3><ul class="notes">{"".join(lines)}</ul>' if lines else ""


def _dl(facts: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{esc(key)}</dt><dd>{esc(value)}</dd>' for key, value in facts.items())}</dl>"


def _tiles(comparison: Comparison) -> str:
    """Tokens in numbers: top-1, generated, routing."""
    a, b = comparison.labels
    tiles = []
    for count in comparison.top1:
        who = {"a": a, "b": b, "both": f"{a} against {b}"}[count.side]
        tiles.append(
            (
                f"{count.agree} / {count.decidable}",
                f"decidable tokens with the reference's top-1, {who} ({count.ties} ties, {count.ties_agree} alike)",
            )
        )
    if comparison.generated:
        found = comparison.generated
        rest = ", ".join(f"{count} {outcome}" for outcome, count in found.counts.items() if outcome != "equal")
        where = f"; first at row {found.first[0]}, step {found.first[1]}" if found.first else ""
        text = f"rows of {found.steps} generated tokens are equal{f' ({rest}{where})' if rest else ''}"
        tiles.append((f"{found.counts.get('equal', 0)} / {found.rows}", text))
    if comparison.routing:
        routing = comparison.routing
        text = f"tokens judged; {routing.between} router flips between the two in {routing.layer_tokens} layer-tokens"
        tiles.append((f"{routing.tokens - routing.excluded} / {routing.tokens}", text))
    if comparison.probes:
        seen = sum(probe.is_seen for probe in comparison.probes)
        weakest = max(comparison.probes, key=lambda probe: probe.least)
        text = "places where a weight 1 % off would have been seen; weakest:"
        text += f" {weakest.module}, from {shown(weakest.least)}"
        tiles.append((f"{seen} / {len(comparison.probes)}", text))
    drawn = "".join(f'<div class="tile"><b>{esc(big)}</b><p>{esc(text)}</p></div>' for big, text in tiles)
    return f'<div class="tiles">{drawn}</div>' if drawn else ""
