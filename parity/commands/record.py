"""``tandem record``: run one backend and write a trace."""

from __future__ import annotations

import argparse
from pathlib import Path

from parity.commands.options import add_backend, add_decode, add_inputs, add_probes, output_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory or address")
    parser.add_argument("--backend", choices=("jax", "torch", "oracle"), required=True, help="oracle: float64 in NumPy")
    add_backend(parser)
    add_inputs(parser)
    parser.add_argument("--reload", metavar="CKPT_B", help="hot reload this checkpoint over the first, then record")
    parser.add_argument(
        "--like", metavar="TRACE", type=Path, help="with --backend oracle: replay the expert choices of this trace"
    )
    add_decode(parser)
    add_probes(parser)
    parser.add_argument(
        "-o", "--output", metavar="TRACE", type=output_file, required=True, help="safetensors file to write"
    )


def run(args: argparse.Namespace) -> int:
    from loaders import open_checkpoint
    from loaders.reading.plan import plan_load, plan_reload
    from loaders.stage import Stage
    from parity.backends import open_backend
    from parity.record import check_quantized, default_inputs, read_inputs, record
    from parity.record_oracle import record_oracle
    from parity.trace import Trace
    from parity.trace_layout import routing_layers

    inputs = read_inputs(args.inputs) if args.inputs else None
    if args.backend == "oracle":
        _refuse_backend_options(args)
        checkpoint = open_checkpoint(args.checkpoint)
        if args.weight_only:
            check_quantized(checkpoint)
        if args.reload:
            first, checkpoint = plan_load(checkpoint, Stage()), open_checkpoint(args.reload)
            plan_reload(checkpoint, first.checkpoint.config, Stage(), first.dtypes)  # what a model would refuse
        like = Trace.load(args.like) if args.like else None
        if like is not None and not (routing_layers(like.tensors) and "E" in checkpoint.config.dims()):
            who = f"{args.checkpoint} has" if "E" not in checkpoint.config.dims() else f"{args.like} names"
            raise ValueError(f"--like: {who} no experts, so there is no choice to replay. Leave it out.")
        options = {"mtp": args.mtp, "adapter": args.adapter, "probes": args.probes}
        trace = record_oracle(checkpoint, inputs or default_inputs(checkpoint), like=like, **options)
    else:
        if args.like or args.probes is not None:
            raise ValueError("--like and --probes go with --backend oracle")
        trace = record(
            args.checkpoint,
            open_backend(args.backend, args.device),
            inputs,
            dtype=args.dtype,
            reload=args.reload,
            max_new_tokens=args.max_new_tokens,
            ignore_eos=args.ignore_eos,
            mtp=args.mtp,
            weight_only=args.weight_only,
            adapter=args.adapter,
            decode=args.decode,
        )
    if args.inputs:
        trace.meta["inputs"] = str(args.inputs)  # so that a failure can name the command that shows it again
    trace.save(args.output)
    print(f"wrote {args.output}: {trace.backend}, {trace.meta['dtype']}, weights {trace.meta['weights']['root'][:8]}")
    return 0


def _refuse_backend_options(args: argparse.Namespace) -> None:
    given = [name for name in ("dtype", "device", "max_new_tokens", "ignore_eos", "decode") if getattr(args, name)]
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{options}: the oracle computes in float64 on the host and does not generate")
