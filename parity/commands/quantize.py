"""``tandem quantize``: write a checkpoint in NVFP4, as ModelOpt does. Needs neither framework."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loaders.quantization.quantized import QuantizedCheckpoint
    from parity.calibrate import Calibration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory or address, not quantised")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="new or empty directory")
    parser.add_argument(
        "--calibrate",
        metavar="TEXT",
        type=Path,
        help="quantise inputs too (W4A4), by what they are on this text, read with the checkpoint's tokenizer.json, or"
        " on the token ids of a .safetensors file; default: weights only (W4A16)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from loaders import open_checkpoint
    from loaders.files.companions import companions
    from loaders.quantization.quantize import quantized
    from loaders.writing.new_directory import new_directory
    from loaders.writing.writer import write_checkpoint

    new_directory(args.output)  # what is wrong with it is said before a calibration that takes minutes
    plain = open_checkpoint(args.checkpoint)
    checkpoint, calibration = quantized(plain), None
    if args.calibrate:
        from parity.calibrate import calibrate, rows_of

        calibration = calibrate(plain, rows_of(plain, args.calibrate), checkpoint.matrices)
        checkpoint = quantized(plain, calibration.amax)
    write_checkpoint(
        args.output,
        checkpoint.tensors,
        checkpoint.read,
        config=checkpoint.config_document,
        generation=checkpoint.generation_document or None,
        quantization=checkpoint.quantization_document,
        copied=companions(plain.source),
    )
    found = facts(checkpoint, calibration) | {"output": str(args.output)}
    print(json.dumps(found, indent=2) if args.json else _text(found))
    return 0


def facts(checkpoint: QuantizedCheckpoint, calibration: Calibration | None) -> dict[str, Any]:
    """What was quantised, what was left alone and why, and what it is worth in bytes."""
    from loaders.quantization.schemes import summary

    before, after = checkpoint.plain.num_bytes, checkpoint.num_bytes
    found = {
        "checkpoint": str(checkpoint.source),
        "quantized": {scheme: len(modules) for scheme, modules in summary(checkpoint.config.quantization).items()},
        "matrices": len(checkpoint.matrices),
        "left_alone": checkpoint.left_alone,
        "bytes_before": before,
        "bytes_after": after,
        "ratio": before / after,
    }
    if calibration is not None:
        found |= {"calibration_tokens": calibration.tokens, "experts_unseen": list(calibration.unseen)}
    return found


def _text(found: dict[str, Any]) -> str:
    lines = [f"wrote {found['output']}"]
    for scheme, count in found["quantized"].items():
        lines.append(f"{scheme}: {count} modules ({found['matrices']} matrices; the experts of a layer are one module)")
    lines += [f"left alone, {why}: {listed}" for why, listed in left_alone(found["left_alone"]).items()]
    if "calibration_tokens" in found:
        lines.append(f"inputs calibrated on {found['calibration_tokens']:,} tokens")
    if unseen := found.get("experts_unseen"):
        rest = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
        lines.append(
            f"no token reached {len(unseen)} matrices of experts, which have the largest input of the others in their"
            f" layer: {', '.join(unseen[:3])}{rest}. Calibrate on more text."
        )
    lines.append(f"{found['bytes_before']:,} bytes became {found['bytes_after']:,}: {found['ratio']:.2f} times less")
    return "\n".join(lines)


def left_alone(reasons: dict[str, str]) -> dict[str, str]:
    """Reason -> modules, those that differ in a number alone told as one: ``4 x model.layers.*.mlp.gate``."""
    found: dict[str, Counter[str]] = {}
    for module, why in reasons.items():
        name = ".".join("*" if part.isdigit() else part for part in module.split("."))
        found.setdefault(why, Counter())[name] += 1
    return {
        why: ", ".join(name if count == 1 and "*" not in name else f"{count} x {name}" for name, count in names.items())
        for why, names in found.items()
    }
