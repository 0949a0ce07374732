"""``tandem inspect``: config, tensors, what would be loaded where, bytes per device. Needs neither framework."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory or address, or a config.json")
    parser.add_argument("--stages", metavar="N", type=int, default=1, help="pipeline stages to plan for")
    parser.add_argument("--tensor", metavar="N", type=int, default=1, help="tensor-parallel devices")
    parser.add_argument("--expert", metavar="N", type=int, default=1, help="expert-parallel devices")
    parser.add_argument("--mtp", action="store_true", help="plan for the multi-token-prediction draft too")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from loaders import Stage
    from parity.inspection import Devices, inspect_stage, open_subject, quantisation, stored_as

    for name in ("stages", "tensor", "expert"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected at least 1")
    subject = open_subject(args.checkpoint)
    devices = Devices(args.tensor, args.expert)
    stages = [inspect_stage(subject, Stage(index, args.stages, args.mtp), devices) for index in range(args.stages)]
    found = {"checkpoint": subject.where, "architecture": subject.config.architecture, "config": subject.document}
    if (checkpoint := subject.checkpoint) is not None:
        found |= {
            "files": len(checkpoint.files.identities),
            "tensors": len(checkpoint.tensors),
            "bytes": checkpoint.num_bytes,
            "dtypes": dict(Counter(info.dtype for info in checkpoint.tensors.values())),
        }
    else:
        found["counted_as"] = stored_as(subject.where, subject.document)
    found |= {"quantisation": quantisation(subject), "stages": stages}
    print(json.dumps(found, indent=2) if args.json else _text(found))
    return 0


def _text(found: dict[str, Any]) -> str:
    config = found["config"]
    said = f"a configuration without weights; plain floats are counted as {found.get('counted_as')}"
    if "files" in found:
        said = (
            f"{found['tensors']} tensors in {found['files']} file(s), {found['bytes']:,} bytes, "
            f"{', '.join(f'{count} {name}' for name, count in found['dtypes'].items())}"
        )
    documents = ("architectures", "quantization_config")
    lines = [
        f"{found['checkpoint']}: {found['architecture']}, {said}",
        "config: " + ", ".join(f"{key}={config[key]}" for key in sorted(config) if key not in documents),
    ]
    if isinstance(found["quantisation"], dict):
        lines.append(_quantisation_text(found["quantisation"]))
    for stage in found["stages"]:
        lines += _stage_text(stage)
    return "\n".join(lines)


def _quantisation_text(found: dict[str, Any]) -> str:
    schemes = "; ".join(f"{scheme}: {count} modules" for scheme, count in found["schemes"].items())
    return f"quantised ({found['format']}): {schemes or 'nothing'}; keys and values: {found['kv_cache']}"


def _stage_text(stage: dict[str, Any]) -> list[str]:
    first, last = stage["layers"]
    line = (
        f"stage {stage['stage']}: layers {first}..{last - 1}, {stage['parameters']} parameters,"
        f" {stage['bytes']:,} bytes from {stage['tensors_loaded']} tensors"
    )
    if "tensors_verified" in stage:
        line += (
            f"; {len(stage['tensors_verified'])} verified as tied, {len(stage['tensors_left_out'])} left out,"
            f" {stage['tensors_of_other_stages']} of other stages"
        )
    lines = [line]
    if "bytes_per_device" in stage:
        whole = ", ".join(stage["replicated"]) or "nothing that could be cut"
        lines.append(f"  per device: {stage['bytes_per_device']:,} bytes; whole on every device: {whole}")
    if "quantised" in stage:
        lines += _saved_text(stage["quantised"])
    return lines


def _saved_text(found: dict[str, Any]) -> list[str]:
    spelled = [".".join("*" if part.isdigit() else part for part in name.split(".")) for name in found["left_alone"]]
    left = ", ".join(f"{count} x {name}" if count > 1 else name for name, count in Counter(spelled).items())
    saved = f"{found['bytes_saved']:,} less than in bfloat16"
    lines = [
        f"  quantised weights: {found['bytes']:,} bytes with their scales, {saved}; left alone: {left or 'nothing'}"
    ]
    if found["block_scale_bytes"]:
        size = f"{found['block_scale_bytes'] / GIB:.2f} GiB per device"
        copy = "a second, swizzled copy would cost as much"
        lines.append(f"  block scales: {size}; {copy}: aliasing saves {size}")
    return lines
