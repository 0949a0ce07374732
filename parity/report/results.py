"""Results for machines: JUnit XML for CI dashboards, JSON for scripts, Markdown for pull requests.

JUnit carries every tensor's margin to its limit as a property, so a dashboard can trend how near a limit is instead of
showing red once it is passed.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from parity.comparison.findings import TensorRow
from parity.comparison.nearest import resemblance
from parity.comparison.outcome import EXIT_CODES, Comparison, Verdict
from parity.events import EventResult, timeline
from parity.wording import cause_word, number, printable, share

Comparisons = Sequence[tuple[str, Comparison]]
_SEVERITY: tuple[Verdict, ...] = ("FAIL", "INVALID", "INCONCLUSIVE", "PASS", "SKIP")
_FROM_EVENT: dict[str, Verdict] = {"pass": "PASS", "fail": "FAIL", "skip": "SKIP"}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2
_MARKS = {"PASS": "✅", "FAIL": "❌", "INVALID": "⛔", "INCONCLUSIVE": "❔", "SKIP": "⏭️"}


def overall(comparisons: Comparisons, events: Sequence[EventResult]) -> Verdict:
    """The worst of all verdicts; SKIP only when nothing else took place."""
    found: set[str] = {comparison.verdict for _, comparison in comparisons}
    found |= {_FROM_EVENT[event.verdict] for event in events}
    for verdict in _SEVERITY:
        if verdict in found:
            return verdict
    return "SKIP"


def to_json(comparisons: Comparisons, events: Sequence[EventResult] = ()) -> str:
    """Everything as one JSON document; the overall verdict and exit code are at its top."""
    verdict = overall(comparisons, events)
    document = {
        "schema": 1,
        "verdict": verdict,
        "exit_code": EXIT_CODES[verdict],
        "comparisons": [{"title": title, **comparison.to_dict()} for title, comparison in comparisons],
        "events": [asdict(event) for event in events],
    }
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def to_junit(comparisons: Comparisons, events: Sequence[EventResult] = ()) -> str:
    """JUnit XML: a suite per comparison with a test case per tensor and one for the verdict; a suite per backend."""
    root = ElementTree.Element("testsuites", name="tandem")
    for title, comparison in comparisons:
        cases = [_case_of_row(title, row) for row in comparison.rows]
        _add_suite(root, title, [*cases, _case_of_verdict(title, comparison)])
    for backend in dict.fromkeys(event.backend for event in events):
        cases = [_case_of_event(event) for event in events if event.backend == backend]
        _add_suite(root, f"lifecycle {backend}", cases)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def to_markdown(comparisons: Comparisons, events: Sequence[EventResult] = ()) -> str:
    """A summary for a pull request or a CI job page."""
    lines = []
    for title, comparison in comparisons:
        lines += [
            f"### {_MARKS[comparison.verdict]} {_cell(title)}: {comparison.kind}",
            "",
            _cell(comparison.summary),
            "",
        ]
        lines += [f"Experiment: {_cell(comparison.experiment)}", ""] if comparison.experiment else []
        lines += [f"`{printable(command)}`" for command in comparison.commands] + ([""] if comparison.commands else [])
        if comparison.rows:
            a, b = (_cell(label) for label in comparison.labels)
            lines += [f"| output of | e({a}) | e({b}) | {a} to {b} | limit | used | |", "|---|--:|--:|--:|--:|--:|---|"]
            lines += [_markdown_row(row) for row in comparison.rows]
            lines.append("")
        alike = [resemblance(comparison.profile, comparison.parts)] if comparison.profile else []
        notes = [*alike, *comparison.notes]
        lines += [f"- {_cell(note)}" for note in notes] + ([""] if notes else [])
    if events:
        backends, rows = timeline(events)
        lines += [f"| event | {' | '.join(map(_cell, backends))} |", "|---" * (len(backends) + 1) + "|"]
        for row in rows:
            lines.append(f"| {_cell(row.event)} | {' | '.join(_markdown_event(row.cells[b]) for b in backends)} |")
        lines.append("")
    return "\n".join(lines)


def _add_suite(root: ElementTree.Element, name: str, cases: list[ElementTree.Element]) -> None:
    counts = {kind: sum(case.find(tag) is not None for case in cases) for kind, tag in _KINDS.items()}
    suite = ElementTree.SubElement(root, "testsuite", name=_clean(name), tests=str(len(cases)))
    suite.attrib.update({kind: str(count) for kind, count in counts.items()})
    suite.extend(cases)


_KINDS = {"failures": "failure", "errors": "error", "skipped": "skipped"}


def _case_of_row(title: str, row: TensorRow) -> ElementTree.Element:
    case = ElementTree.Element("testcase", classname=_clean(title), name=row.name)
    values: dict[str, Any] = {
        "used": row.used,
        "margin": row.margin,
        "token_margin": row.token_margin,
        "limit": row.limit,
        "lid": row.lid,
    }
    values |= {"e_a": row.e_a, "e_b": row.e_b, "direct": row.direct, "tokens": row.tokens}
    _add_properties(case, values)
    if row.verdict == "FAIL":
        text = row.nonfinite or f"error {row.worst_token}"
        ElementTree.SubElement(
            case, "failure", message=_clean(f"{row.name}: {row.cause}"), type=str(row.cause)
        ).text = text
    elif row.verdict == "SKIP":
        ElementTree.SubElement(case, "skipped", message="no token was left to judge")
    return case


def _case_of_verdict(title: str, comparison: Comparison) -> ElementTree.Element:
    case = ElementTree.Element("testcase", classname=_clean(title), name="verdict")
    tag = {"FAIL": "failure", "INVALID": "error", "INCONCLUSIVE": "error", "SKIP": "skipped"}.get(comparison.verdict)
    _add_properties(case, _properties_of(comparison))
    if tag:
        kind = comparison.cause or comparison.verdict
        told = ElementTree.SubElement(case, tag, message=_clean(comparison.summary), type=kind)
        told.text = _clean("\n".join((*comparison.commands, *comparison.notes)))
    return case


def _properties_of(comparison: Comparison) -> dict[str, Any]:
    """Of a verdict: how near the nearest limit was, how small a fault would have been seen, what it resembles."""
    judged = [min(row.margin, row.token_margin) for row in comparison.rows if row.verdict != "SKIP"]
    found: dict[str, Any] = {"margin": min(judged)} if judged else {}
    found |= {"experiment": comparison.experiment} if comparison.experiment else {}
    if comparison.probes:
        found |= {"places_seen": sum(probe.is_seen for probe in comparison.probes), "places": len(comparison.probes)}
        found["least_fault_seen"] = max(probe.least for probe in comparison.probes)
    for place, one in enumerate(comparison.nearest_mutant(), 1):
        found |= {f"looks_like_{place}": one.name, f"similarity_{place}": one.similarity}
    return found


def _add_properties(case: ElementTree.Element, values: Mapping[str, Any]) -> None:
    """Numbers in six digits; what there is none of is left out."""
    given = {name: value for name, value in values.items() if value is not None}
    parent = ElementTree.SubElement(case, "properties") if given else None
    for name, value in given.items():
        assert parent is not None
        shown = value if isinstance(value, str) else f"{value:.6g}"
        ElementTree.SubElement(parent, "property", name=name, value=_clean(shown))


def _case_of_event(event: EventResult) -> ElementTree.Element:
    name = event.event if event.version is None else f"{event.event} (v{event.version})"
    case = ElementTree.Element("testcase", classname=f"lifecycle.{_clean(event.backend)}", name=_clean(name))
    if event.seconds is not None:
        case.set("time", f"{event.seconds:.3f}")
    if event.verdict != "pass":
        tag = "failure" if event.verdict == "fail" else "skipped"
        ElementTree.SubElement(case, tag, message=_clean(event.detail))
    return case


def _clean(text: str) -> str:
    """Without the characters that XML cannot carry; the rest is escaped by the writer."""
    return _NOT_XML.sub("\ufffd", text)


def _cell(text: str) -> str:
    """Text as text: no column of its own, no markup."""
    return printable(html.escape(text.replace("\n", " "), quote=False)).replace("|", "\\|")


def _markdown_row(row: TensorRow) -> str:
    numbers = " | ".join(number(value) for value in (row.e_a, row.e_b, row.direct, row.limit))
    last = row.verdict if row.cause is None else f"**{row.verdict}** {cause_word(row.cause)}"
    return f"| `{row.module}` | {numbers} | {share(row.used)} | {last} |"


def _markdown_event(result: EventResult | None) -> str:
    if result is None:
        return ""
    root = f" `{result.root[:8]}`" if result.root else ""
    version = f" v{result.version}" if result.version is not None else ""
    return _cell(f"{_MARKS[_FROM_EVENT[result.verdict]]}{version}{root} {result.detail}".rstrip())
