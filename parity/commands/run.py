"""``tandem run``: record two backends and the oracle, and compare: rounding or bug, where, and whose?"""

from __future__ import annotations

import argparse

from parity.commands.options import add_backend, add_inputs, add_probes, add_reports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory")
    parser.add_argument("--a", choices=("jax", "torch"), default="jax", help="ours (default: jax)")
    parser.add_argument("--b", choices=("jax", "torch"), default="torch", help="the peer (default: torch)")
    add_backend(parser)
    parser.add_argument("--device-a", metavar="D", help="device of a, when the two differ")
    parser.add_argument("--device-b", metavar="D", help="device of b, when the two differ")
    add_inputs(parser)
    add_probes(parser)
    add_reports(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print the verdict's sentence only")


def run(args: argparse.Namespace) -> int:
    from loaders import open_checkpoint
    from parity.backends import open_backend
    from parity.commands.reports import write_reports
    from parity.compare import compare
    from parity.record import default_inputs, read_inputs, record
    from parity.record_oracle import record_oracle

    checkpoint = open_checkpoint(args.checkpoint)
    inputs = read_inputs(args.inputs) if args.inputs else default_inputs(checkpoint)
    names = ("dtype", "max_new_tokens", "ignore_eos", "mtp", "weight_only", "adapter")
    options = {name: getattr(args, name) for name in names}
    a = record(args.checkpoint, open_backend(args.a, args.device_a or args.device), inputs, **options)
    b = record(args.checkpoint, open_backend(args.b, args.device_b or args.device), inputs, **options)
    for trace in (a, b) if args.inputs else ():
        trace.meta["inputs"] = str(args.inputs)  # so that a failure can name the command that shows it again
    # each against its own expert choices: a flip between near-equal experts is not an error of arithmetic
    common = {"mtp": args.mtp, "adapter": args.adapter}
    oracle_a = record_oracle(checkpoint, inputs, like=a, probes=args.probes, **common)
    oracle_b = record_oracle(checkpoint, inputs, like=b, probes=0, **common)  # faults are asked of the first alone
    comparison = compare(a, b, oracle_a, oracle_b=oracle_b)
    print(f"{comparison.verdict}: {comparison.summary}" if args.quiet else comparison.to_text())
    facts = {"checkpoint": args.checkpoint}
    write_reports(args, "tandem run", [(f"{args.a} against {args.b}", comparison)], [], facts)
    return comparison.exit_code
