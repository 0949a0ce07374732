"""The outcome of lifecycle events: what each backend did at each event, as data and as a table of text."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

EventVerdict = Literal["pass", "fail", "skip"]

_COLOURS = {"pass": "\033[32m", "fail": "\033[31m", "skip": "\033[90m"}
_RESET = "\033[0m"
ROOT_SHOWN = 8  # hex digits of a weights root: enough to see that A, B, A comes back to A


class Skipped(Exception):  # noqa: N818  (not an error)
    """The event does not apply to this checkpoint or backend; says why."""


@dataclass(frozen=True, slots=True)
class EventResult:
    """What one backend did at one event.

    Attributes:
        event: what happened, for people: ``load A``, ``reload B``, ``attach LoRA``.
        detail: why it failed or was skipped, or what was checked.
        version: the model's version after it; root: its weights' root digest; seconds: how long it took.
    """

    event: str
    backend: str
    verdict: EventVerdict
    detail: str = ""
    version: int | None = None
    root: str | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class EventRow:
    """One line of the timeline: an event and, by backend, what came of it (None where it did not take place)."""

    event: str
    cells: dict[str, EventResult | None]


def timeline(events: Sequence[EventResult]) -> tuple[list[str], list[EventRow]]:
    """Backends and rows, both in order of appearance. An event that a backend meets twice has two rows."""
    backends = list(dict.fromkeys(result.backend for result in events))
    met: Counter[tuple[str, str]] = Counter()
    rows: dict[tuple[str, int], EventRow] = {}
    for result in events:
        occurrence = met[result.event, result.backend]
        met[result.event, result.backend] += 1
        row = rows.setdefault((result.event, occurrence), EventRow(result.event, dict.fromkeys(backends)))
        row.cells[result.backend] = result
    return backends, list(rows.values())


def numbered_roots(events: Sequence[EventResult]) -> dict[str, int]:
    """The root digests in the order in which they are first met, numbered from 0: what their colours go by."""
    roots = dict.fromkeys(result.root for result in events if result.root)
    return {root: number for number, root in enumerate(roots)}


def render_text(events: Sequence[EventResult], *, colour: bool | None = None) -> str:
    """The timeline as an aligned table, with what failed told below it.

    ``colour`` None means: ANSI colours when standard output is a terminal.
    """
    if not events:
        return "no events"
    colour = sys.stdout.isatty() if colour is None else colour
    backends, rows = timeline(events)
    lines = [["event", *backends], *([row.event, *(_cell(row.cells[name]) for name in backends)] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    out = []
    for index, line in enumerate(lines):
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        if colour and index:
            results = [rows[index - 1].cells[name] for name in backends]
            cells[1:] = [_painted(cell, result) for cell, result in zip(cells[1:], results, strict=True)]
        out.append("  ".join(cells).rstrip())
    told = [f"{r.verdict}  {r.event} on {r.backend}: {r.detail}" for r in events if r.detail and r.verdict != "pass"]
    return "\n".join([*out, "", *told] if told else out)


def _cell(result: EventResult | None) -> str:
    if result is None:
        return "-"
    parts = [result.verdict]
    parts += [f"v{result.version}"] if result.version is not None else []
    parts += [result.root[:ROOT_SHOWN]] if result.root else []
    parts += [f"{result.seconds:.2f} s"] if result.seconds is not None else []
    return " ".join(parts)


def _painted(cell: str, result: EventResult | None) -> str:
    """The text in colour, its padding not: colour codes would keep trailing spaces from being cut."""
    text = cell.rstrip()
    return cell if result is None else f"{_COLOURS[result.verdict]}{text}{_RESET}{cell[len(text) :]}"
