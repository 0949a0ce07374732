"""The sections of the report about one comparison: the finding, the pictures, the counts."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping

from parity.comparison.findings import Divergence
from parity.comparison.nearest import resemblance
from parity.comparison.outcome import Comparison
from parity.comparison.verdict import weakest
from parity.report.chart import chart_key, error_chart
from parity.report.heat import heat_map
from parity.report.sparkline import sparkline
from parity.report.tables import constants_table, flags_tables, probes_table, tensor_table
from parity.wording import TOKEN_LIMIT, number, share, times

esc = html.escape


def anchor(title: str) -> str:
    """The fragment by which a section is found on its page."""
    return "s-" + re.sub(r"[^\w]+", "-", title)


def comparison_section(
    title: str, comparison: Comparison, *, is_told: bool = False, has_commands: bool = True, origin: str = ""
) -> str:
    """One comparison: the finding, the chart beside where it begins, the tokens, the counts, the tables.

    Args:
        title: of the section.
        comparison: any.
        is_told: the finding stands above already, in the banner.
        has_commands: whether to say what to run next: not where the banner does.
        origin: the checkpoint, where it is not that of the whole page.
    """
    head = _heading(title, comparison)
    head += f'<p class="key">Checkpoint: {esc(origin)}</p>' if origin else ""
    head += "" if is_told else _finding(comparison, has_commands=has_commands)
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


def _finding(comparison: Comparison, *, has_commands: bool = True) -> str:
    """The headline, what to run next, and why."""
    headline = f'<p class="headline">{esc(comparison.headline)}</p>' if comparison.headline else ""
    return f'{headline}{commands(comparison) if has_commands else ""}<p class="sentence">{esc(comparison.detail)}</p>'


def _alike(comparison: Comparison) -> str:
    if not comparison.profile:
        return ""
    told = resemblance(comparison.profile, comparison.parts)
    return f'<p class="sentence">{esc(told[0].upper() + told[1:])}.</p>'


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
    row = comparison.worst_row
    basis = "of this token" if row is not None and row.by_token else "over all tokens"
    keys = f'Of the squared error {basis}: <i class="dot" style="background:var(--fail)"></i>made here {local}%'
    keys += f' &nbsp; <i class="dot" style="background:var(--h3)"></i>brought along from before {100 - local}%'
    facts = {} if found.suspect_module in (None, found.module) else {"first over its limit": found.module}
    facts |= {} if row is None else {"of its limit, over all tokens": share(1 - row.margin)}
    facts |= {"worst single token": f"row {found.row}, position {found.position}"}
    facts |= {} if row is None else {f"of {TOKEN_LIMIT}": share(1 - row.token_margin)}
    facts |= {
        f"error before, {basis}": number(found.before),
        f"error after, {basis}": number(found.after),
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
    key = f'<span class="key">{used}% of {TOKEN_LIMIT if row.by_token else "its limit"} used</span>'
    return (
        f'<div class="found {comparison.verdict.lower()}"><h3>Nearest to its limit</h3>'
        f'<div class="big">{esc(row.module)}</div><p>{esc(what)}</p>'
        f"{_dl({name: number(value) for name, value in errors.items()})}{bar}{key}</div>"
    )


def _dl(facts: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<dt>{esc(key)}</dt><dd>{esc(value)}</dd>' for key, value in facts.items())}</dl>"


def _tiles(comparison: Comparison) -> str:
    """Tokens in numbers: top-1, generated, routing; tinted where the number is a failure."""
    a, b = comparison.labels
    tiles = []
    for count in comparison.top1:
        who = {"a": f"{a} picks the oracle's top-1", "b": f"{b} picks the oracle's top-1"}
        ties = "near-ties left out"
        ties += f": {count.ties}, of which {count.ties_agree} alike" if count.ties else ": none"
        text = f"tokens: {who.get(count.side, f'{a} and {b} pick the same top-1')} ({ties})"
        tiles.append((f"{count.agree} of {count.decidable}", text, count.agree < count.decidable))
    if comparison.generated:
        found = comparison.generated
        rest = ", ".join(f"{count} {outcome}" for outcome, count in found.counts.items() if outcome != "equal")
        where = f"; first at row {found.first[0]}, step {found.first[1]}" if found.first else ""
        text = f"rows of {found.steps} generated tokens are equal{f' ({rest}{where})' if rest else ''}"
        tiles.append((f"{found.counts.get('equal', 0)} of {found.rows}", text, found.outcome == "differs"))
    if comparison.routing:
        routing = comparison.routing
        text = f"tokens judged; {routing.between} router flips between the two in {routing.layer_tokens} layer-tokens"
        tiles.append((f"{routing.tokens - routing.excluded} of {routing.tokens}", text, routing.broken is not None))
    if comparison.probes and comparison.verdict != "FAIL":  # beside a failure nobody asks what else would show
        seen = sum(probe.is_seen for probe in comparison.probes)
        has_digests = all(facts.get("root") for facts in comparison.meta[:2])
        text = (
            f"places where a weight 1 % off would have been seen; {weakest(comparison.probes, has_digests=has_digests)}"
        )
        tiles.append((f"{seen} of {len(comparison.probes)}", text, False))
    drawn = "".join(
        f'<div class="tile{" fail" if is_wrong else ""}"><b>{esc(big)}</b><p>{esc(text)}</p></div>'
        for big, text, is_wrong in tiles
    )
    return f'<div class="tiles">{drawn}</div>' if drawn else ""
