"""``tandem lifecycle``: every event in the life of a weight, each checked against a cold load."""

from __future__ import annotations

import argparse
from pathlib import Path

from parity.commands.options import add_reports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="CKPT_A", help="checkpoint directory or address every model starts from")
    parser.add_argument("b", metavar="CKPT_B", help="other weights of the same config")
    parser.add_argument("--backend", choices=("jax", "torch", "both"), default="both", help="default: both")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, tpu, ...; default: cpu (torch), the first (jax)")
    parser.add_argument(
        "--scratch", metavar="DIR", type=Path, help="where to write exports and broken checkpoints; left empty"
    )
    add_reports(parser)


def run(args: argparse.Namespace) -> int:
    import tempfile

    from parity.backends import NAMES
    from parity.commands.reports import write_reports
    from parity.events import render_text
    from parity.lifecycle.run import run_lifecycle

    backends = NAMES if args.backend == "both" else (args.backend,)
    with tempfile.TemporaryDirectory(prefix="tandem-", dir=args.scratch) as scratch:
        results = run_lifecycle(args.a, args.b, backends=backends, scratch=Path(scratch), device=args.device)
    write_reports(args, "tandem lifecycle", [], results, {"A": args.a, "B": args.b})
    print(render_text(results))
    return int(any(result.verdict == "fail" for result in results))
