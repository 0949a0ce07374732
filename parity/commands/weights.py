"""``tandem weights``: digests weight by weight, on disk, in JAX, in torch and in traces."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from parity.commands.options import output_file
from parity.whole_file import write_report

if TYPE_CHECKING:
    from parity.weights import WeightComparison

WHAT = "checkpoint directory, trace file, or jax:DIR or torch:DIR, which loads it there"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("x", metavar="X", help=WHAT)
    parser.add_argument(
        "y", metavar="Y", nargs="?", help="likewise; left out: what each installed backend makes of the directory X"
    )
    parser.add_argument("--device", metavar="D", help="where to load; default: cpu (torch), the first (jax)")
    parser.add_argument("--all", action="store_true", help="list every tensor that differs, not groups of them")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write everything as JSON")


def run(args: argparse.Namespace) -> int:
    import json

    from parity.comparison.outcome import jsonable

    found = _compared(args)
    # the worst first: what differs, then what could not be compared
    code = next((code for code in (1, 3) if any(one.exit_code == code for one in found)), 0)
    if args.json:
        document: dict[str, Any] = {"schema": 1, "exit_code": code, "comparisons": [one.to_dict() for one in found]}
        text = json.dumps(jsonable(document), indent=2, default=str, allow_nan=False)
        write_report(args.json, text + "\n")
    print("\n\n".join(one.to_text(everything=args.all) for one in found))
    return code


def _compared(args: argparse.Namespace) -> list[WeightComparison]:
    from parity.backends import NAMES
    from parity.errors import DeviceNotFound
    from parity.weights import compare_weights, open_weights

    loads = args.y is None or any(text.startswith(("jax:", "torch:")) for text in (args.x, args.y))
    if args.device and not loads:
        raise ValueError("--device: neither is loaded. Write jax:DIR or torch:DIR, or leave it out")
    first = open_weights(args.x, device=args.device)
    if args.y is not None:
        return [compare_weights(first, open_weights(args.y, device=args.device))]
    if not first.is_files:
        raise ValueError(
            f"{args.x} alone has nothing to be held against. Give a second one, or a checkpoint directory."
        )
    found, missing = [], []
    for name in NAMES:  # one model in memory at a time
        try:
            found.append(compare_weights(first, open_weights(f"{name}:{args.x}", device=args.device)))
        except DeviceNotFound as error:
            missing.append(str(error))
    if not found:
        raise DeviceNotFound("; ".join(missing))
    for text in missing:
        print(f"skipped: {text}")
    return found
