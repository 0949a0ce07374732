"""One self-contained HTML file about a run: what a person looks at first, drawn; what they look up, folded away."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from parity.comparison import Comparison
from parity.events import EventResult
from parity.export_results import overall
from parity.report_parts import anchor, commands, comparison_section, glance, timeline_section
from parity.report_style import CSS, framed
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
    known = merged([about(comparison) for _, comparison in comparisons])
    is_alone = len(comparisons) == 1 and not events
    body = [
        banner(comparisons, events),
        index([line_of(name, comparison) for name, comparison in comparisons]),
        timeline_section(events) if events else "",
        *(comparison_section(name, found, is_told=is_alone) for name, found in sorted(comparisons, key=_is_fine)),
    ]
    return render_page(title, body, {**facts, **{k: v for k, v in known.items() if k not in facts}})


def render_page(title: str, body: Sequence[str], facts: Mapping[str, str]) -> str:
    """A document around sections that are drawn already, by ``banner`` and ``parity.report_parts``."""
    heading = html.escape(title)
    chips = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    head = f'<p class="brand">Tandem</p><h1>{heading}</h1>' + (f'<dl class="facts">{chips}</dl>' if chips else "")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{heading}</title><style>{CSS}</style></head>"
        f'<body class="tandem"><main>{head}{"".join(body)}</main></body></html>'
    )


def render_fragment(comparison: Comparison) -> str:
    """One comparison for a notebook cell: the sentence and a bar for each tensor in sight, the rest folded away."""
    return framed(glance(" against ".join(comparison.labels), comparison))


def banner(comparisons: Sequence[tuple[str, Comparison]], events: Sequence[EventResult]) -> str:
    """What was found, and of one comparison why and what to run next; of several how many pass."""
    verdict = overall(comparisons, events)
    lines, word, after = [], WORDS[verdict], ""
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
        if found.headline and not events:
            word, after = found.headline, commands(found)
        lines.append(found.detail if word == found.headline else found.summary)
        lines += [f"Experiment: {found.experiment}."] if found.experiment else []
    elif comparisons:
        passing = sum(comparison.verdict == "PASS" for _, comparison in comparisons)
        lines.append(f"Comparisons: {passing} of {len(comparisons)} pass.")
        wrong = [comparison for _, comparison in comparisons if comparison.verdict not in _FINE]
        told = {comparison.headline for comparison in wrong}
        if len(told) == 1 and "" not in told and not events:  # all say one thing
            word, after = wrong[0].headline, commands(wrong[0])
    text = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    return f'<div class="banner {verdict.lower()}"><div class="word">{html.escape(word)}</div>{text}{after}</div>'


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
    names = dict.fromkeys(str(meta.get("checkpoint") or "") for meta in comparison.meta[:2])
    shape = comparison.meta[0].get("shape") or []
    tokens = max((row.tokens for row in comparison.rows), default=0)
    prompt = f"{shape[0]} rows of {shape[1]} positions, {tokens} tokens judged" if len(shape) > 1 else ""
    found = {"checkpoint": ", ".join(filter(None, names)), "dtype": comparison.dtype, "prompt": prompt}
    return {key: value for key, value in (found | versions).items() if value}


def merged(facts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Facts of several comparisons: each value once, the first few of many."""
    out: dict[str, str] = {}
    for key in dict.fromkeys(key for one in facts for key in one):
        values = list(dict.fromkeys(one[key] for one in facts if key in one))
        more = f" and {len(values) - NAMED} more" if len(values) > NAMED else ""
        out[key] = "; ".join(values[:NAMED]) + more
    return out
