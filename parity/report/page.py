"""One self-contained HTML file about a run: what a person looks at first, drawn; what they look up, folded away."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from parity.comparison.outcome import Comparison
from parity.events import EventResult
from parity.report.parts import anchor, commands, comparison_section, glance
from parity.report.results import overall
from parity.report.style import CSS, framed
from parity.report.timeline import timeline_section
from parity.wording import share

WORDS = {
    "PASS": "Everything agrees",
    "FAIL": "Something differs",
    "INVALID": "Not comparable",
    "INCONCLUSIVE": "Inconclusive",
    "SKIP": "Nothing could be run",
}
_FINE = ("PASS", "SKIP")  # nothing to look at first
NAMED = 4  # different values of one fact, at most
Line = Mapping[str, str]  # of the index: title, verdict, kind, headline, used


def render_html(
    title: str,
    *,
    comparisons: Sequence[tuple[str, Comparison]],
    events: Sequence[EventResult],
    facts: Mapping[str, str],
) -> str:
    """The report as one HTML document: inline styles and SVG, no scripts, nothing fetched.

    ``facts`` are shown under the title, before those that the comparisons know: machine, checkpoint, command.
    """
    abouts = [about(comparison) for _, comparison in comparisons]
    known = merged(abouts)
    is_alone = len(comparisons) == 1 and not events
    origins = [one.get("checkpoint", "") for one in abouts]
    is_said = len(set(origins)) < 2  # above
    finding, told = find(comparisons, events)
    sections = [
        comparison_section(
            name,
            found,
            is_told=is_alone,
            has_commands=told is None or found.commands != told.commands,
            origin="" if is_said else origin,
        )
        for (name, found), origin in sorted(zip(comparisons, origins, strict=True), key=lambda one: _is_fine(one[0]))
    ]
    body = [
        banner(comparisons, events),
        index([line_of(name, comparison) for name, comparison in comparisons]),
        timeline_section(events) if events else "",
        *sections,
    ]
    facts = {**facts, **{k: v for k, v in known.items() if k not in facts}}
    checkpoint = facts.get("checkpoint", "").rstrip("/").rpartition("/")[2]
    return render_page(title, body, facts, tab=[finding, checkpoint])


def render_page(title: str, body: Sequence[str], facts: Mapping[str, str], *, tab: Sequence[str] = ()) -> str:
    """A document around sections that are drawn already, by ``banner`` and ``parity.report.parts``.

    ``tab``: what tells this page from others of its title, where a browser shows one line: the finding first.
    """
    heading = html.escape(title)
    line = html.escape(" \u2013 ".join(filter(None, (*tab, title))))
    chips = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    head = f'<p class="brand">Tandem</p><h1>{heading}</h1>' + (f'<dl class="facts">{chips}</dl>' if chips else "")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{line}</title><style>{CSS}</style></head>"
        f'<body class="tandem"><main>{head}{"".join(body)}</main></body></html>'
    )


def render_fragment(comparison: Comparison) -> str:
    """One comparison for a notebook cell: the sentence and a bar for each tensor in sight, the rest folded away."""
    return framed(glance(" against ".join(comparison.labels), comparison))


def banner(comparisons: Sequence[tuple[str, Comparison]], events: Sequence[EventResult]) -> str:
    """What was found, and of one comparison why and what to run next; of several how many pass."""
    verdict = overall(comparisons, events)
    word, told_of = find(comparisons, events)
    lines: list[str] = []
    if events:
        counts = {name: sum(event.verdict == name for event in events) for name in ("pass", "fail", "skip")}
        told = [
            f"{count} {word}"
            for word, count in zip(("passed", "failed", "skipped"), counts.values(), strict=True)
            if count
        ]
        lines.append(f"Lifecycle: {', '.join(told)} of {len(events)} events.")
    if len(comparisons) == 1:
        found = comparisons[0][1]
        lines.append(found.detail if word == found.headline else found.summary)
        lines += [f"Experiment: {found.experiment}."] if found.experiment else []
    elif comparisons:
        passing = sum(comparison.verdict == "PASS" for _, comparison in comparisons)
        lines.append(f"Comparisons: {passing} of {len(comparisons)} pass.")
    after = "" if told_of is None else commands(told_of)
    text = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    return f'<div class="banner {verdict.lower()}"><div class="word">{html.escape(word)}</div>{text}{after}</div>'


def find(comparisons: Sequence[tuple[str, Comparison]], events: Sequence[EventResult]) -> tuple[str, Comparison | None]:
    """The finding of a page in one clause, and the comparison whose it is; None where they say different things."""
    shown = [comparison for _, comparison in comparisons]
    if len(shown) > 1:
        shown = [comparison for comparison in shown if comparison.verdict not in _FINE]
    headlines = {comparison.headline for comparison in shown}
    if events or len(headlines) != 1 or "" in headlines:
        return WORDS[overall(comparisons, events)], None
    return shown[0].headline, shown[0]


def _is_fine(titled: tuple[str, Comparison]) -> bool:
    return titled[1].verdict in _FINE


def line_of(title: str, comparison: Comparison) -> dict[str, str]:
    """A comparison in the index."""
    worst = comparison.worst_row
    used = "" if worst is None else share(worst.used)
    headline = comparison.headline or comparison.summary
    return {"title": title, "verdict": comparison.verdict, "kind": comparison.kind, "headline": headline, "used": used}


def index(lines: Sequence[Line]) -> str:
    """Every comparison in a line that leads to its section, those that do not pass first; nothing of a single one."""
    if len(lines) < 2:
        return ""
    rows = "".join(
        f'<tr><td><span class="pill {html.escape(line["verdict"].lower())}">{html.escape(line["kind"])}</span></td>'
        f'<td><a href="#{anchor(line["title"])}">{html.escape(line["title"])}</a></td>'
        f'<td>{html.escape(line["headline"])}</td><td class="num">{html.escape(line["used"])}</td></tr>'
        for line in sorted(lines, key=lambda line: line["verdict"] in _FINE)
    )
    head = '<tr><th></th><th>comparison</th><th>finding</th><th class="num">of its limit</th></tr>'
    return f'<nav class="card"><div class="scroll"><table class="index">{head}{rows}</table></div></nav>'


def about(comparison: Comparison) -> dict[str, str]:
    """What was compared: checkpoint, dtype, prompt, and what each backend ran on."""
    if len(comparison.meta) < 2:
        return {}
    versions = {}
    for meta in comparison.meta[:2]:
        known = {name: version for name, version in (meta.get("versions") or {}).items() if name != "python"}
        versions[f"{meta['backend']} ran on"] = ", ".join(
            [*(f"{name} {version}" for name, version in known.items()), *filter(None, [meta.get("device")])]
        )
    shape = comparison.meta[0].get("shape") or []
    tokens = max((row.tokens for row in comparison.rows), default=0)
    prompt = f"{shape[0]} rows of {shape[1]} positions, {tokens} tokens judged" if len(shape) > 1 else ""
    found = {"checkpoint": _checkpoints(comparison), "dtype": comparison.dtype, "prompt": prompt}
    return {key: value for key, value in (found | versions).items() if value}


def _checkpoints(comparison: Comparison) -> str:
    """Where the weights are from; of two places each side's, and whether they hold the same."""
    names = [str(meta.get("checkpoint") or "") for meta in comparison.meta[:2]]
    if names[0] == names[1] or not all(names):
        return next(filter(None, names), "")
    roots = [meta.get("root") for meta in comparison.meta[:2]]
    equal = f" (equal weights, root {roots[0][:8]})" if roots[0] and roots[0] == roots[1] else ""
    return ", ".join(f"{label} of {name}" for label, name in zip(comparison.labels, names, strict=True)) + equal


def merged(facts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Facts of several comparisons: each value once, the first few of many; of checkpoints that differ their number.

    Several beside each other would look as if they had been held against each other: each section names its own.
    """
    out: dict[str, str] = {}
    for key in dict.fromkeys(key for one in facts for key in one):
        values = list(dict.fromkeys(one[key] for one in facts if key in one))
        more = f" and {len(values) - NAMED} more" if len(values) > NAMED else ""
        out[key] = "; ".join(values[:NAMED]) + more
        if key == "checkpoint" and len(values) > 1:
            out[key] = f"{len(values)} different ones, named with each comparison"
    return out
