"""``tandem bisect``: which layer, module and operation differs, and on which side?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from parity.commands.options import add_backend, add_decode, output_file
from parity.whole_file import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory or address")
    parser.add_argument("--a", choices=("jax", "torch"), default="jax", help="one backend (default: jax)")
    parser.add_argument("--b", choices=("jax", "torch"), default="torch", help="the other (default: torch)")
    add_backend(parser)
    parser.add_argument("--device-a", metavar="D", help="device of a, when the two differ")
    parser.add_argument("--device-b", metavar="D", help="device of b, when the two differ")
    parser.add_argument(
        "--inputs", metavar="FILE", type=Path, help="safetensors with input_ids, attention_mask, position_ids"
    )
    parser.add_argument("--adapter", metavar="DIR", help="attach this PEFT adapter (LoRA), for every row")
    add_decode(parser)
    parser.add_argument("--row", metavar="N", type=int, help="run row N of the inputs alone, without its padding")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--layer", metavar="N", type=int, help="look into this decoder layer, whatever the layers say")
    depth.add_argument(
        "--everywhere",
        action="store_true",
        help="when no layer stands out, look into every one: for bugs too small for a layer to show",
    )
    parser.add_argument(
        "--no-oracle",
        action="store_true",
        help="feed each backend the other's values alone: quick, but not whose it is",
    )
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="print the last sentence only")


def run(args: argparse.Namespace) -> int:
    from loaders import open_checkpoint
    from loaders.adapters.opening import open_adapter
    from parity.backends import open_backend
    from parity.bisect import bisect
    from parity.comparison.outcome import jsonable
    from parity.model_backend import ModelBackend
    from parity.record import default_inputs, read_inputs, row_alone

    checkpoint = open_checkpoint(args.checkpoint)
    inputs = read_inputs(args.inputs) if args.inputs else default_inputs(checkpoint)
    inputs = inputs if args.row is None else row_alone(inputs, args.row)
    adapter = None if args.adapter is None else open_adapter(args.adapter, checkpoint.config)
    sides = []
    for which, name, device in (("a", args.a, args.device_a), ("b", args.b, args.device_b)):
        backend = open_backend(name, device or args.device)
        model = backend.load(args.checkpoint, dtype=args.dtype)
        if args.adapter is not None:
            with backend.scope():
                model = model.attach_lora(args.adapter)
        label = f"{name} ({which})" if args.a == args.b else None
        sides.append(ModelBackend(model, backend, label, decode=args.decode))
    notes: list[str] = []
    rounds = [side.name for side in sides if side.model.quantizes_inputs or side.model.rounds_cache]
    if rounds and not args.no_oracle:
        who = " and ".join(rounds)
        notes.append(f"no oracle: it does not round inputs of layers, or keys and values, as {who} does.")
    oracle = None if rounds or args.no_oracle else checkpoint
    a, b = sides
    where = {"layer": args.layer, "everywhere": args.everywhere}
    found = bisect(a, b, inputs, checkpoint=oracle, adapter=adapter, **where)
    found = found.noted(notes)
    if args.json:
        text = json.dumps(jsonable(found.to_json()), indent=2, allow_nan=False)
        write_report(args.json, text + "\n")
    print(found.summary if args.quiet else found.to_text())
    return found.exit_code
