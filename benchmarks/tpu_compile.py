"""Compile serving programs for TPUs that are not there, at a depth of your own, and read off what came of them.

    python benchmarks/tpu_compile.py --model qwen3-8b --program decode --mesh tensor=4 [--layers 4] [--json FILE]

Needs ``libtpu`` (the ``tpu-compiler`` extra), no TPU and no weights. What ``tandem plan`` compiles, one program at a
time and with the optimised HLO to look at (``--hlo``). Per device: bytes of arguments, temporaries, aliased (donated)
outputs and the peak, HBM traffic over the least, and how often each collective runs in a step, with how many bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from parity.planning.environment import compiler_environment

os.environ.update(compiler_environment(os.environ))  # before jax is imported

import jax

from parity.planning.chips import chip_of
from parity.planning.compiling import measured, mesh_on
from parity.planning.depths import Shallow
from parity.planning.meshes import PROGRAMS, Workload, parse_mesh, stored_bytes
from parity.planning.minimum import minimum_of
from parity.planning.subject import planned

CONFIGS = Path(__file__).parent / "configs"
ROWS = {"prefill": 1, "decode": 8}
LENGTH = {"prefill": 1024, "decode": 2048}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one program, of JSON's types."""
    subject = planned(str(CONFIGS / f"{args.model}.json"), "nvfp4" if args.nvfp4 else None)
    chip, _, topology = args.topology.partition(":")
    sizes = parse_mesh(args.mesh)
    mesh, stage = (
        mesh_on(chip_of(chip), topology, sizes),
        Shallow(depth=args.layers or subject.config.num_hidden_layers),
    )
    rows, length = args.rows or ROWS[args.program], args.length or LENGTH[args.program]
    load = Workload(rows, length, length, subject.dtype, subject.plain, subject.stored)
    found = measured(subject.config, args.program, load, mesh, stage, hlo=args.hlo)
    least = minimum_of(subject.config, args.program, load, sizes, stage)
    return {
        "model": args.model,
        "nvfp4": args.nvfp4,
        "program": args.program,
        "rows": rows,
        "length": length,
        "topology": args.topology,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "jax": jax.__version__,
        "total_weight_bytes": sum(stored_bytes(subject.config, load, stage).values()),
        "least_bytes": least.bytes,
        "ratio": round((found["hbm_read_bytes"] + found["hbm_written_bytes"]) / least.bytes, 4),
        **found,
    }


def table(row: dict[str, Any]) -> str:
    """One measurement for people."""
    lines = [f"{row['model']}, {row['layers']} layers, {row['program']} B={row['rows']} S={row['length']},"]
    lines[0] += f" {row['topology']} {row['mesh']}, jax {row['jax']}"
    lines.append(
        f"  lower {row['lower_s']:.1f} s, compile {row['compile_s']:.1f} s; traffic {row['ratio']} of the least"
    )
    names = [name for name in row if name.endswith("_bytes") and name != "total_weight_bytes"]
    lines += [f"  {name.removesuffix('_bytes'):11} {row[name] / 1e6:10.1f} MB per device" for name in names]
    lines += [
        f"  {kind:18} {found['count']:4} {found['bytes'] / 1e6:9.2f} MB" for kind, found in row["collectives"].items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(path.stem for path in CONFIGS.glob("*.json")), required=True)
    parser.add_argument("--program", choices=PROGRAMS, required=True)
    parser.add_argument("--mesh", default="tensor=4", help="axis=size, comma separated")
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--nvfp4", action="store_true", help="weights in NVFP4, but for the head")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--rows", type=int, help="B: 1 for prefill, 8 for decode")
    parser.add_argument("--length", type=int, help="T: 1024 for prefill, 2048 for decode")
    parser.add_argument("--json", help="file to write the measurement to")
    parser.add_argument("--hlo", help="file to write the optimised program to")
    args = parser.parse_args()
    row = measure(args)
    print(table(row))
    if args.json:
        Path(args.json).write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
