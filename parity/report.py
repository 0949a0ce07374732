"""One self-contained HTML file about a run: what a person looks at first, drawn; what they look up, folded away."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from parity.comparison import Comparison
from parity.events import EventResult
from parity.export_results import overall
from parity.report_parts import comparison_section, glance, timeline_section
from parity.report_style import CSS, framed

WORDS = {
    "PASS": "Everything agrees",
    "FAIL": "Something differs",
    "INVALID": "Not comparable",
    "INCONCLUSIVE": "Inconclusive",
    "SKIP": "Nothing could be run",
}


def render_html(
    title: str,
    *,
    comparisons: Sequence[tuple[str, Comparison]],
    events: Sequence[EventResult],
    facts: Mapping[str, str],
) -> str:
    """The report as one HTML document: inline styles and SVG, no scripts, nothing fetched.

    ``facts`` are shown under the title: machine, versions, checkpoint, command.
    """
    body = [
        banner(comparisons, events),
        timeline_section(events) if events else "",
        *(comparison_section(name, comparison) for name, comparison in comparisons),
    ]
    return render_page(title, body, facts)


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
    """The worst verdict in words, how many pass, and what the first of the others say."""
    verdict = overall(comparisons, events)
    lines = []
    if events:
        counts = {name: sum(event.verdict == name for event in events) for name in ("pass", "fail", "skip")}
        told = [
            f"{count} {word}"
            for word, count in zip(("passed", "failed", "skipped"), counts.values(), strict=True)
            if count
        ]
        lines.append(f"Lifecycle: {', '.join(told)} of {len(events)} events.")
    if len(comparisons) == 1:
        lines.append(comparisons[0][1].summary)
    elif comparisons:
        found = [(name, comparison) for name, comparison in comparisons if comparison.verdict != "PASS"]
        lines.append(f"Comparisons: {len(comparisons) - len(found)} of {len(comparisons)} pass.")
        lines += [f"{name}: {comparison.summary}" for name, comparison in found[:3]]
    text = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    return f'<div class="banner {verdict.lower()}"><div class="word">{WORDS[verdict]}</div>{text}</div>'
