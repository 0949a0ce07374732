"""``tandem compare``: NumPy and safetensors only, so it runs where neither backend is installed."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="TRACE", type=Path, help="ours")
    parser.add_argument("b", metavar="TRACE", type=Path, help="the peer, whose own rounding sets the tolerance")
    parser.add_argument("--oracle", metavar="TRACE", type=Path, help="float64 reference: tells whose an error is")
    parser.add_argument(
        "--oracle-b", metavar="TRACE", type=Path, help="the reference of the peer, with its own routing replayed"
    )
    for name, what in (("html", "a report to look at"), ("junit", "JUnit XML"), ("json", "JSON"), ("md", "Markdown")):
        parser.add_argument(f"--{name}", metavar="FILE", type=Path, help=f"write {what}")
    parser.add_argument("-q", "--quiet", action="store_true", help="print the verdict's sentence only")


def run(args: argparse.Namespace) -> int:
    from parity.compare import compare
    from parity.trace import Trace

    oracle, oracle_b = (Trace.load(path) if path else None for path in (args.oracle, args.oracle_b))
    comparison = compare(Trace.load(args.a), Trace.load(args.b), oracle, oracle_b=oracle_b)
    print(f"{comparison.verdict}: {comparison.summary}" if args.quiet else comparison.to_text())
    results = [(f"{args.a.name} against {args.b.name}", comparison)]
    if args.html:
        from parity.report import render_html

        facts = {"a": str(args.a), "b": str(args.b), "oracle": str(args.oracle or "none")}
        page = render_html("tandem compare", comparisons=results, events=[], facts=facts)
        args.html.write_text(page, encoding="utf-8")
    if args.junit or args.json or args.md:
        from parity import export_results

        for path, export in (
            (args.junit, export_results.to_junit),
            (args.json, export_results.to_json),
            (args.md, export_results.to_markdown),
        ):
            if path:
                path.write_text(export(results), encoding="utf-8")
    return comparison.exit_code
