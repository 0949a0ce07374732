"""``tandem export``: load a checkpoint, optionally reload another over it, and write the tensors back."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory or address")
    parser.add_argument("--backend", choices=("jax", "torch"), required=True)
    parser.add_argument("--reload", metavar="CKPT_B", help="hot reload this checkpoint over the first")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="new or empty directory")


def run(args: argparse.Namespace) -> int:
    from loaders.writing.new_directory import new_directory
    from parity.backends import open_backend

    new_directory(args.output)  # what is wrong with it is said before a checkpoint is loaded
    backend = open_backend(args.backend)
    model = backend.load(args.checkpoint)
    with backend.scope():
        if args.reload:
            model = model.update_weights_from_disk(args.reload)
        written = model.export(args.output)
    print(f"wrote {written}: {model.report.num_tensors} tensors, {model.report.num_bytes:,} bytes")
    return 0
