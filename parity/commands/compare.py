"""``tandem compare``: NumPy and safetensors only, so it runs where neither backend is installed."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path

from parity.commands.options import add_reports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="TRACE", type=Path, help="ours")
    parser.add_argument("b", metavar="TRACE", type=Path, help="the peer, whose own rounding sets the tolerance")
    parser.add_argument("--oracle", metavar="TRACE", type=Path, help="float64 reference: tells whose an error is")
    parser.add_argument(
        "--oracle-b", metavar="TRACE", type=Path, help="the reference of the peer, with its own routing replayed"
    )
    add_reports(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print the verdict's sentence only")


def run(args: argparse.Namespace) -> int:
    from parity.commands.reports import write_reports
    from parity.compare import compare
    from parity.trace import Trace

    oracle, oracle_b = (Trace.load(path) if path else None for path in (args.oracle, args.oracle_b))
    comparison = compare(Trace.load(args.a), Trace.load(args.b), oracle, oracle_b=oracle_b)
    if comparison.verdict == "FAIL":
        comparison = replace(comparison, commands=(*comparison.commands, _again(args)))
    results = [(f"{args.a.name} against {args.b.name}", comparison)]
    facts = {"a": str(args.a), "b": str(args.b), "oracle": str(args.oracle or "none")}
    write_reports(args, "tandem compare", results, [], facts)
    print(f"{comparison.verdict}: {comparison.summary}" if args.quiet else comparison.to_text())
    return comparison.exit_code


def _again(args: argparse.Namespace) -> str:
    """The command that compares the same files once more."""
    words = ["tandem", "compare", str(args.a), str(args.b)]
    words += ["--oracle", str(args.oracle)] if args.oracle else []
    return shlex.join(words + (["--oracle-b", str(args.oracle_b)] if args.oracle_b else []))
