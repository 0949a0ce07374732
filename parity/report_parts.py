"""The sections of the report: lifecycle timeline, and everything about one comparison."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence

from parity.chart import chart_key, error_chart
from parity.comparison import Comparison
from parity.events import ROOT_SHOWN, EventResult, timeline
from parity.findings import Divergence
from parity.heat import heat_map
from parity.nearest import looks_like
from parity.report_tables import constants_table, flags_tables, probes_table, tensor_table
from parity.sparkline import sparkline
from parity.wording import number, share, shown, times

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


def anchor(title: str) -> str:
    """The fragment by which a section is found on its page."""
    return "s-" + re.sub(r"[^\w]+", "-", title)


def comparison_section(title: str, comparison: Comparison, *, is_told: bool = False) -> str:
    """One comparison: the finding, the chart beside where it begins, the tokens, the counts, the tables.

    ``is_told``: the finding stands above already, in the banner.
    """
    head = _heading(title, comparison) + ("" if is_told else _finding(comparison))
    return f'<section class="card" id="{anchor(title)}">{head}{_alike(comparison)}{_details(comparison)}</section>'


def glance(title: str, comparison: Comparison) -> str:
    """The same for a notebook: a bar for each tensor, and everything else folded."""
    more = _details(comparison)
    folded = f"<details><summary>Chart, tokens, arithmetic, tables</summary>{more}</details>" if more else ""
    head = f"{_heading(title, comparison)}{_finding(comparison)}{_alike(comparison)}"
    return f"{head}{sparkline(comparison)}{folded}"


def commands(comparison: Comparison) -> str:
    """What to run next, to be copied."""
    lines = "".join(f"<code>{esc(command)}</code>" for command in comparison.commands)
    return f'<div class="next"><span>Next</span><div>{lines}</div></div>' if lines else ""


def _heading(title: str, comparison: Comparison) -> str:
    tone = "inconclusive" if comparison.experiment else comparison.verdict.lower()  # it is no plain pass
    pill = f'<span class="pill {tone}">{esc(comparison.kind)}</span>'
    done = ""
    if comparison.experiment:
        done = f'<p class="experiment"><b>Experiment:</b> {esc(comparison.experiment)}.</p>'
    return f'<div class="head"><h2>{esc(title)}</h2>{pill}</div>{done}'


def _finding(comparison: Comparison) -> str:
    """The headline, what to run next, and why."""
    headline = f'<p class="headline">{esc(comparison.headline)}</p>' if comparison.headline else ""
    return f'{headline}{commands(comparison)}<p class="sentence">{esc(comparison.detail)}</p>'


def _alike(comparison: Comparison) -> str:
    if not comparison.profile:
        return ""
    return f'<p class="sentence">Looks like {esc(looks_like(comparison.nearest_mutant()))}.</p>'


def _details(comparison: Comparison) -> str:
    chart = error_chart(comparison)
    drawn = f'<h3>Error by module</h3><div class="scroll">{chart}</div>{chart_key(comparison)}'
    side = _divergence_card(comparison, comparison.divergence) if comparison.divergence else _tightest_card(comparison)
    notes = "".join(f"<li>{esc(note)}</li>" for note in comparison.notes)
    parts = [
        f'<div class="split"><div>{drawn}</div>{side}</div>' if chart else "",
        heat_map(comparison),
        _tiles(comparison),
        f'<ul class="notes">{notes}</ul>' if notes else "",
        flags_tables(comparison),
        tensor_table(comparison) if comparison.rows else "",
        probes_table(comparison) if comparison.probes else "",
        constants_table(comparison) if comparison.limits else "",
    ]
    return "".join(parts)


def _divergence_card(comparison: Comparison, found: Divergence) -> str:
    """Where it begins, whose it is, and how much of the error was handed down."""
    who = {"a": comparison.labels[0], "b": comparison.labels[1]}.get(found.side or "", "the two, apart")
    total = found.inherited + found.local
    local = 100 if not math.isfinite(total) or total == 0 else round(100 * found.local**2 / found.after**2)
    parts = ((local, "--fail"), (100 - local, "--h3"))
    drawn = "".join(f'<i style="width:{width}%;background:var({colour})"></i>' for width, colour in parts)
    keys = '<i class="dot" style="background:var(--fail)"></i>made here '
    keys += f'{local}% &nbsp; <i class="dot" style="background:var(--h3)"></i>handed down {100 - local}% (squared)'
    row = comparison.worst_row
    facts = {} if found.suspect_module in (None, found.module) else {"first over its limit": found.module}
    facts |= {} if row is None else {"of its limit": share(row.used)}
    facts |= {
        "worst token": f"row {found.row}, position {found.position}"
        + ("" if row is None or row.by_token else f" ({share(1 - row.token_margin)})"),
        "error before": number(found.before),
        "error after": number(found.after),
        "growth here": f"{times(found.growth)}x",
        "growth elsewhere": f"{times(found.usual_growth)}x",
    }
    title = "Where it begins" if found.suspect_module else "First over its limit"
    what = "output of this module" if found.suspect_module else "no single step stands out: it builds up"
    return (
        f'<div class="found fail"><h3>{title}</h3><div class="big">{esc(found.suspect_module or found.module)}</div>'
        f"<p>{esc(who)} \u00b7 {what}</p>{_dl(facts)}"
        f'<div class="bar">{drawn}</div><span class="key">{keys}</span></div>'
    )


def _tightest_card(comparison: Comparison) -> str:
    """On a pass, what came nearest to failing."""
    row = comparison.worst_row
    if row is None:
        return ""
    a, b = comparison.labels
    token, values, limit = row.worst_token, (row.e_a, row.e_b, row.direct), row.limit
    what = "its error over all tokens"
    if row.by_token and token is not None:
        values, what = (token.e_a, token.e_b, token.direct), f"at row {token.row}, position {token.position}"
        limit = max(filter(None, values[:2]), default=token.direct) / row.used if row.used else limit
    errors = {f"error of {a}": values[0], f"error of {b}": values[1], f"{a} to {b}": values[2], "limit": limit}
    used = round(100 * row.used)
    bar = f'<div class="bar"><i style="width:{min(used, 100)}%;background:var(--pass)"></i></div>'
    key = f'<span class="key">{used}% of its limit used</span>'
    return (
        f'<div class="found {comparison.verdict.lower()}"><h3>Nearest to its limit</h3>'
        f'<div class="big">{esc(row.module)}</div><p>{esc(what)}</p>'
        f"{_dl({name: number(value) for name, value in errors.items()})}{bar}{key}</div>"
    )


def _dl(facts: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{esc(key)}</dt><dd>{esc(value)}</dd>' for key, value in facts.items())}</dl>"


def _tiles(comparison: Comparison) -> str:
    """Tokens in numbers: top-1, generated, routing."""
    a, b = comparison.labels
    tiles = []
    for count in comparison.top1:
        who = {"a": f"{a} and the oracle", "b": f"{b} and the oracle", "both": f"{a} and {b}"}[count.side]
        ties = f" ({count.ties} more are ties, {count.ties_agree} of them alike)" if count.ties else ""
        text = f"tokens that rounding cannot decide have the same top-1 in {who}{ties}"
        tiles.append((f"{count.agree} / {count.decidable}", text))
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
    if comparison.probes and comparison.verdict != "FAIL":  # beside a failure nobody asks what else would show
        seen = sum(probe.is_seen for probe in comparison.probes)
        weakest = max(comparison.probes, key=lambda probe: probe.least)
        text = "places where a weight 1 % off would have been seen; weakest:"
        text += f" {weakest.module}, from {shown(weakest.least)}"
        tiles.append((f"{seen} / {len(comparison.probes)}", text))
    drawn = "".join(f'<div class="tile"><b>{esc(big)}</b><p>{esc(text)}</p></div>' for big, text in tiles)
    return f'<div class="tiles">{drawn}</div>' if drawn else ""
