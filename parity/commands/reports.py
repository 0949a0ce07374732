"""Writing results where the options of ``add_reports`` say."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from parity.comparison.outcome import Comparison
from parity.events import EventResult
from parity.whole_file import write_report


def write_reports(
    args: argparse.Namespace,
    title: str,
    comparisons: list[tuple[str, Comparison]],
    events: Sequence[EventResult],
    facts: dict[str, str],
) -> None:
    """Write every report that was asked for."""
    from parity.report import results as export_results

    if args.html:
        from parity.report.page import render_html

        page = render_html(title, comparisons=comparisons, events=list(events), facts=facts)
        write_report(args.html, page)
    for path, export in (
        (args.junit, export_results.to_junit),
        (args.json, export_results.to_json),
        (args.md, export_results.to_markdown),
    ):
        if path:
            write_report(path, export(comparisons, events))
