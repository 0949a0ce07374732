"""The lifecycle as a table: what each backend did at each event, and which weights it was left with."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from parity.events import ROOT_SHOWN, EventResult, numbered_roots, timeline
from parity.report.style import ROOT_COLOURS

esc = html.escape
KEY = "The square takes its colour from the root digest: same colour, same weights, bit for bit."
MANY = f" After {len(ROOT_COLOURS)} sets of weights there are no more colours: an empty square is told by its digits."


def timeline_section(events: Sequence[EventResult], numbers: Mapping[str, int] | None = None) -> str:
    """The lifecycle, with its heading; ``numbers`` as for ``timeline_table``."""
    return f'<h2>Lifecycle</h2><div class="card">{timeline_table(events, numbers)}</div>'


def timeline_table(events: Sequence[EventResult], numbers: Mapping[str, int] | None = None) -> str:
    """Events by backends: green, red or grey, with the version and the weights' root after each.

    ``numbers``: of the roots, which decide their colours; None: of these events. A page with several tables has them
    of all its events, so that a colour is one set of weights everywhere on it.
    """
    numbers = numbered_roots(events) if numbers is None else numbers
    backends, rows = timeline(events)
    head = "".join(f"<th>{esc(name)}</th>" for name in backends)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{_event_cell(row.cells[name], numbers)}</td>" for name in backends)
        lines.append(f"<tr><td>{esc(row.event)}</td>{cells}</tr>")
    table = f'<table class="timeline"><tr><th>event</th>{head}</tr>{"".join(lines)}</table>'
    key = KEY + (MANY if len(numbers) > len(ROOT_COLOURS) else "")
    return f'<div class="scroll">{table}</div><p class="key">{key}</p>'


def _event_cell(result: EventResult | None, numbers: Mapping[str, int]) -> str:
    if result is None:
        return '<div class="cell none">\u2013</div>'
    parts = [f"<b>{result.verdict}</b>"]
    parts += [f"<span>v{result.version}</span>"] if result.version is not None else []
    parts += [_root(result.root, numbers[result.root])] if result.root else []
    parts += [f'<span class="key">{result.seconds:.2f} s</span>'] if result.seconds is not None else []
    if result.detail and result.verdict != "pass":
        parts.append(f'<span class="why">{esc(result.detail)}</span>')
    return f'<div class="cell {result.verdict}" title="{esc(result.detail)}">{"".join(parts)}</div>'


def _root(root: str, number: int) -> str:
    """The first digits of a root beside a square of its colour, so that A, B, A is seen to come back."""
    style = f"background:{ROOT_COLOURS[number]}" if number < len(ROOT_COLOURS) else "border:1px solid var(--muted)"
    return f'<span class="mono"><i class="dot" style="{style}"></i>{esc(root[:ROOT_SHOWN])}</span>'
