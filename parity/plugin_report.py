"""What the tests of a session held against each other, on its way to one HTML report.

Under xdist a test runs in one process and the report is written in another. So everything travels with pytest's own
test reports, as JSON values: a section of the page as it will be, and what the page says above it.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from parity.asserting import Held
from parity.events import EventResult

Entry = dict[str, Any]  # JSON values


def of_comparison(held: Held, nodeid: str, again: str | None = None) -> Entry:
    """One comparison of a test: its section of the page, drawn, and its line of the index.

    ``again``: the command that compares the same traces once more. Of a failure the page says it, how to run the test
    alone, and how to take the two backends apart.
    """
    from parity.report import about, line_of
    from parity.report_parts import comparison_section

    title = f"{nodeid}: {held.title}" + ("" if held.is_asserted else " (measured, not asserted)")
    found = held.comparison
    if found.verdict != "PASS" and held.is_asserted:
        commands = (*found.commands, shlex.join(["pytest", nodeid]), *([again] if again else []))
        found = replace(found, commands=commands)
    return {
        "title": title,
        "verdict": found.verdict if held.is_asserted else None,
        "summary": found.summary,
        "line": line_of(title, found),
        "about": about(found),
        "section": comparison_section(title, found),
    }


def of_events(events: Sequence[EventResult], nodeid: str) -> Entry:
    """The lifecycle that a test ran."""
    return {"title": nodeid, "events": [asdict(event) for event in events]}


def write(path: Path, entries: Sequence[Entry], *, command: str) -> None:
    """One self-contained page over all of them, in the order of their titles, whoever finished first."""
    from parity.comparison import Comparison
    from parity.report import banner, index, merged, render_page
    from parity.report_parts import timeline_section

    entries = sorted(entries, key=lambda entry: entry["title"])
    compared = [entry for entry in entries if "section" in entry]
    asserted = [
        (entry["title"], Comparison(verdict=entry["verdict"], summary=entry["summary"]))
        for entry in compared
        if entry["verdict"]
    ]
    lives = [
        (entry["title"], [EventResult(**event) for event in entry["events"]]) for entry in entries if "events" in entry
    ]
    events = [event for _, found in lives for event in found]
    body = [banner(asserted, events), index([entry["line"] for entry in compared])]
    body += [timeline_section(found) for _, found in lives]
    body += [entry["section"] for entry in compared]
    facts = {"command": command, "comparisons": str(len(compared)), "events": str(len(events))}
    facts |= merged([entry["about"] for entry in compared])
    facts["python"] = f"{platform.python_version()} on {platform.machine()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_page("Parity of a test session", body, facts), encoding="utf-8")
