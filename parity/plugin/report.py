"""What the tests of a session held against each other, on its way to one HTML report.

Under xdist a test runs in one process and the report is written in another. So everything travels with pytest's own
test reports, as JSON values: a section of the page as it will be, and what the page says above it.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.asserting import Held
from parity.events import EventResult, numbered_roots
from parity.whole_file import write_report

if TYPE_CHECKING:
    from parity.comparison.outcome import Comparison

Entry = dict[str, Any]  # JSON values


def of_comparison(held: Held, nodeid: str, again: str | None = None, alone: str | None = None) -> Entry:
    """One comparison of a test: its section of the page, drawn, and its line of the index.

    ``again``: the command that compares the same traces once more. ``alone``: the one that runs the test by itself. Of
    a failure the page says both, and how to take the two backends apart.
    """
    from parity.report.page import about, line_of
    from parity.report.parts import comparison_section

    title = f"{nodeid}: {held.title}" + ("" if held.is_asserted else " (measured, not asserted)")
    found = held.comparison
    if found.verdict != "PASS" and held.is_asserted:
        found = replace(found, commands=(*filter(None, (alone, *found.commands, again)),))
    known = about(found)
    return {
        "title": title,
        "verdict": found.verdict if held.is_asserted else None,
        "summary": found.summary,
        "line": line_of(title, found),
        "headline": found.headline,
        "commands": list(found.commands),
        "about": known,
        "section": comparison_section(title, found, origin=known.get("checkpoint", "")),
    }


def of_events(events: Sequence[EventResult], nodeid: str) -> Entry:
    """The lifecycle that a test ran."""
    return {"title": nodeid, "events": [asdict(event) for event in events]}


def write(path: Path, entries: Sequence[Entry], *, command: str) -> None:
    """One self-contained page over all of them, in the order of their titles, whoever finished first."""
    from parity.report.page import banner, find, index, merged, render_page
    from parity.report.parts import commands
    from parity.report.timeline import timeline_section

    entries = sorted(entries, key=lambda entry: entry["title"])
    compared = [entry for entry in entries if "section" in entry]
    asserted = [(entry["title"], _finding_of(entry)) for entry in compared if entry["verdict"]]
    lives = [
        (entry["title"], [EventResult(**event) for event in entry["events"]]) for entry in entries if "events" in entry
    ]
    events = [event for _, found in lives for event in found]
    body = [banner(asserted, events), index([entry["line"] for entry in compared])]
    numbers = numbered_roots(events)
    body += [timeline_section(found, numbers) for _, found in lives]
    finding, told = find(asserted, events)
    above = "" if told is None else commands(told)  # what the banner says to run next, no section has to say again
    body += [entry["section"].replace(above, "", 1) if above else entry["section"] for entry in compared]
    facts = {"command": command, "comparisons": str(len(compared)), "events": str(len(events))}
    facts |= merged([entry["about"] for entry in compared])
    facts["python"] = f"{platform.python_version()} on {platform.machine()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(path, render_page("Parity of a test session", body, facts, tab=[finding]))


def _finding_of(entry: Entry) -> Comparison:
    """As much of a comparison as the banner tells."""
    from parity.comparison.outcome import Comparison

    told = {name: entry[name] for name in ("verdict", "summary", "headline")}
    return Comparison(**told, commands=tuple(entry["commands"]))
