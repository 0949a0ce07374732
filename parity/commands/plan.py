"""``tandem plan``: what a model will do on a TPU that is not there. Compiles with the real compiler; needs libtpu."""

from __future__ import annotations

import argparse
import json
import sys

from parity.commands.options import output_file
from parity.whole_file import write_report

DOES_NOT_FIT = 1

MOST_SLOTS = 2**27  # of a row: a thousand times what models are made for
MOST_ROWS = 2**20  # a million sequences at a time: more is a typo, and no int64 after all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory or address, or a config.json")
    parser.add_argument("--chip", metavar="CHIP", default="v5e", help="v5e, v5p, v6e or tpu7x; default: v5e")
    parser.add_argument("--topology", metavar="AxB", help="slice, 4x4 or 2x2x1; default: the smallest that will do")
    parser.add_argument(
        "--mesh",
        metavar="M",
        help="data=2,tensor=4; also fsdp, expert; default: one that leaves little on a device",
    )
    parser.add_argument("--batch", metavar="B", type=int, default=8, help="rows at a time; default: 8")
    parser.add_argument("--context", metavar="S", type=int, default=8192, help="slots of the cache; default: 8192")
    parser.add_argument("--prompt", metavar="T", type=int, help="tokens a row that prefill reads; default: up to 1024")
    parser.add_argument("--quant", choices=("nvfp4",), help="quantise weights while they are read")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="computed in; default: as stored")
    parser.add_argument("--exact", action="store_true", help="compile every layer rather than extrapolate from a few")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write JSON")


def run(args: argparse.Namespace) -> int:
    """0: it fits; 1: it does not, and where no slice would hold it, nothing is compiled or written."""
    from parity.planning.chips import chip_of
    from parity.planning.environment import check_installed

    problems = [
        f"--{name} is {value}, expected at least 1"
        for name in ("batch", "context", "prompt")
        if (value := getattr(args, name)) is not None and value < 1
    ]
    if args.context > MOST_SLOTS:
        problems.append(f"--context is {args.context}, expected at most {MOST_SLOTS}")
    if args.batch > MOST_ROWS:
        problems.append(f"--batch is {args.batch}, expected at most {MOST_ROWS}")
    if args.prompt is not None and args.prompt > args.context:
        problems.append(f"--prompt is {args.prompt}, expected at most the {args.context} slots of --context")
    if problems:
        raise ValueError("; ".join(problems))
    chip = chip_of(args.chip)
    if args.topology is not None:
        chip.num_devices(args.topology)
    check_installed()
    from parity.planning.meshes import Workload, parse_mesh
    from parity.planning.plan import NoSliceHoldsIt, Request, plan
    from parity.planning.subject import planned
    from parity.planning.text import plan_text

    sizes = None if args.mesh is None else parse_mesh(args.mesh)
    subject = planned(args.checkpoint, args.quant)
    prompt, dtype = args.prompt or min(args.context, 1024), args.dtype or subject.dtype
    load = Workload(args.batch, args.context, prompt, dtype, subject.plain, subject.stored)
    request = Request(args.checkpoint, subject.config, args.quant, chip, load, is_exact=args.exact)
    try:
        found = plan(request, args.topology, sizes)
    except NoSliceHoldsIt as error:
        print(f"tandem plan: {error}", file=sys.stderr)
        return DOES_NOT_FIT
    if args.json:
        write_report(args.json, json.dumps(found, indent=2) + "\n")
    print(plan_text(found))
    return 0 if found["fits"] else DOES_NOT_FIT
