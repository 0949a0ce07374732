"""``tandem inspect``: config, tensors, what would be loaded where, bytes per device. Needs neither framework."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loaders import Checkpoint, Stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory")
    parser.add_argument("--stages", metavar="N", type=int, default=1, help="pipeline stages to plan for")
    parser.add_argument("--tensor", metavar="N", type=int, default=1, help="tensor-parallel devices (needs jax)")
    parser.add_argument("--expert", metavar="N", type=int, default=1, help="expert-parallel devices (needs jax)")
    parser.add_argument("--mtp", action="store_true", help="plan for the multi-token-prediction draft too")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from loaders import Stage, open_checkpoint

    checkpoint = open_checkpoint(args.checkpoint)
    stages = [_stage(checkpoint, Stage(index, args.stages, args.mtp), args) for index in range(args.stages)]
    found = {
        "checkpoint": str(checkpoint.source),
        "architecture": checkpoint.config.architecture,
        "config": checkpoint.config_document,
        "files": len(checkpoint.identities),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.num_bytes,
        "dtypes": dict(Counter(info.dtype for info in checkpoint.tensors.values())),
        "quantisation": "none",  # a quantised checkpoint does not open: its options are refused by name
        "stages": stages,
    }
    print(json.dumps(found, indent=2) if args.json else _text(found))
    return 0


def _stage(checkpoint: Checkpoint, stage: Stage, args: argparse.Namespace) -> dict[str, Any]:
    from loaders.dtypes import bits
    from loaders.plan import plan_load

    plan = plan_load(checkpoint, stage)
    sizes = {}
    for spec in plan.specs:
        sizes[spec.name] = math.prod(spec.shape) * bits(plan.dtypes[spec.name]) // 8
    report = plan.report()
    layers = stage.layers(checkpoint.config.num_hidden_layers)
    found: dict[str, Any] = {
        "stage": stage.index,
        "layers": [layers.start, layers.stop],
        "parameters": len(plan.specs.params),
        "bytes": sum(sizes.values()),
        "tensors_loaded": report.num_tensors,
        "tensors_verified": list(report.verified),
        "tensors_left_out": list(report.left_out),
        "tensors_of_other_stages": report.other_stages,
    }
    if args.tensor * args.expert > 1:
        found |= _per_device(checkpoint, plan.specs.params, sizes, args)
    return found


def _per_device(checkpoint: Checkpoint, params: Any, sizes: dict[str, int], args: argparse.Namespace) -> dict[str, Any]:
    from jax.sharding import AbstractMesh

    from jax_models.sharding import axes_of, param_spec, replicated

    mesh = AbstractMesh((args.expert, args.tensor), ("expert", "tensor"))
    dims = checkpoint.config.dims()
    total = 0
    for spec in params:
        parts = 1
        for axis in param_spec(spec, dims, mesh):
            parts *= math.prod(mesh.shape[name] for name in axes_of(axis))
        total += sizes[spec.name] // parts
    return {"bytes_per_device": total, "replicated": replicated(params, dims, mesh)}


def _text(found: dict[str, Any]) -> str:
    config = found["config"]
    lines = [
        f"{found['checkpoint']}: {found['architecture']}, {found['tensors']} tensors in {found['files']} file(s), "
        f"{found['bytes']:,} bytes, {', '.join(f'{count} {name}' for name, count in found['dtypes'].items())}",
        "config: " + ", ".join(f"{key}={config[key]}" for key in sorted(config) if key != "architectures"),
    ]
    for stage in found["stages"]:
        first, last = stage["layers"]
        lines.append(
            f"stage {stage['stage']}: layers {first}..{last - 1}, {stage['parameters']} parameters,"
            f" {stage['bytes']:,} bytes"
            f" from {stage['tensors_loaded']} tensors; {len(stage['tensors_verified'])} verified as tied,"
            f" {len(stage['tensors_left_out'])} left out, {stage['tensors_of_other_stages']} of other stages"
        )
        if "bytes_per_device" in stage:
            lines.append(
                f"  per device: {stage['bytes_per_device']:,} bytes; whole on every device: "
                f"{', '.join(stage['replicated']) or 'nothing that could be cut'}"
            )
    return "\n".join(lines)
