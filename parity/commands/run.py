"""``tandem run``: record two backends and the oracle, and compare: rounding or bug, where, and whose?"""

from __future__ import annotations

import argparse

from parity.commands.options import add_backend, add_inputs, add_probes, add_reports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory or address")
    parser.add_argument("--a", choices=("jax", "torch"), default="jax", help="ours (default: jax)")
    parser.add_argument("--b", choices=("jax", "torch"), default="torch", help="the peer (default: torch)")
    add_backend(parser)
    parser.add_argument("--device-a", metavar="D", help="device of a, when the two differ")
    parser.add_argument("--device-b", metavar="D", help="device of b, when the two differ")
    add_inputs(parser)
    parser.add_argument(
        "--decode",
        metavar="N",
        type=int,
        help="compare again with the last N tokens of every row read one at a time, as generation does; default: 8,"
        " fewer of short rows; 0: do not",
    )
    add_probes(parser)
    add_reports(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print the verdict's sentence only")


def run(args: argparse.Namespace) -> int:
    from parity.backends import open_backend
    from parity.commands.reports import write_reports
    from parity.comparison.outcome import EXIT_CODES
    from parity.pairs import run_pair
    from parity.record import read_inputs
    from parity.report.results import overall

    inputs = read_inputs(args.inputs) if args.inputs else None
    sides = (open_backend(args.a, args.device_a or args.device), open_backend(args.b, args.device_b or args.device))
    names = ("dtype", "decode", "max_new_tokens", "ignore_eos", "mtp", "weight_only", "adapter", "probes")
    options = {name: getattr(args, name) for name in names}
    found = run_pair(args.checkpoint, sides, inputs, source=args.inputs, **options)
    write_reports(args, "tandem run", list(found.comparisons), [], {"checkpoint": args.checkpoint})
    (_, whole), *others = found.comparisons
    print(f"{whole.verdict}: {whole.summary}" if args.quiet else whole.to_text())
    for title, decoded in others:
        if args.quiet:
            print(f"{title}: {decoded.verdict}: {decoded.summary}")
        elif decoded.verdict in ("PASS", whole.verdict):  # what is wrong of all tokens at once is wrong of these too
            print(f"\n{title}: {decoded.kind}: {decoded.headline}")
        else:
            print(f"\n{title}:\n{decoded.to_text()}")
    for note in found.notes:
        print(f"note: {note}")
    return EXIT_CODES[overall(found.comparisons, [])]
