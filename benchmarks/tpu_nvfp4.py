"""Compile products with NVFP4 weights for TPUs that are not there: the kernel, XLA's own expansion, and bfloat16.

    python benchmarks/tpu_nvfp4.py [--chips v5e,v6e,tpu7x] [--shapes decode-up,experts-up] [--ways kernel] [--json FILE]

Needs ``libtpu`` (the ``tpu-compiler`` extra) and no TPU. Bytes are the compiler's count, over those that must be moved
(weights as stored, rows, results); it counts a copy to VMEM ahead of use as well, and a kernel as its author says.
``seconds`` is its estimate, which leaves out custom calls, so the kernel's own time is in none of the columns; ``roof``
is the least bytes at the chip's bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

# before jax is imported: no TPU, no metadata server to ask, and several compilers at once
os.environ.update(TPU_SKIP_MDS_QUERY="1", JAX_PLATFORMS="cpu", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
os.environ.setdefault("TPU_LOG_DIR", "disabled")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jax_models.kernels.grouped import grouped_on_tpu
from jax_models.kernels.nvfp4 import nvfp4_grouped_matmul, nvfp4_matmul, reference_grouped_matmul, reference_matmul

TOPOLOGY = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
BANDWIDTH = {"v5e": 819e9, "v6e": 1640e9, "tpu7x": 3690e9}  # bytes a second; of tpu7x half a chip, which is a device
# rows, K, N, experts (0 for a dense product): Qwen3-8B's MLP and the experts of Qwen3-30B-A3B
SHAPES = {
    "decode-up": (8, 4096, 12288, 0),
    "decode-down": (8, 12288, 4096, 0),
    "prefill-up": (512, 4096, 12288, 0),
    "prefill-down": (512, 12288, 4096, 0),
    "experts-up": (64, 2048, 1536, 128),
    "experts-down": (64, 768, 2048, 128),
}
WAYS = {
    "kernel": (nvfp4_matmul, nvfp4_grouped_matmul),
    "xla": (reference_matmul, reference_grouped_matmul),
    "bfloat16": (lambda x, w: jnp.einsum("tk,nk->tn", x, w, preferred_element_type=jnp.float32), grouped_on_tpu),
}


def arguments(way: str, shape: str, sharding: jax.sharding.Sharding) -> list[jax.ShapeDtypeStruct]:
    A, K, N, E = SHAPES[shape]
    lead = (E,) if E else ()
    weights = [((*lead, N, K // 2), jnp.uint8), ((*lead, N, K // 16), jnp.float8_e4m3fn)]
    alphas = [((E, 1), jnp.float32)] if E else []
    if way == "bfloat16":
        weights, alphas = [((*lead, N, K), jnp.bfloat16)], []
    sizes = [*alphas, ((E,), jnp.int32)] if E else []
    return [jax.ShapeDtypeStruct(*one, sharding=sharding) for one in [((A, K), jnp.bfloat16), *weights, *sizes]]


def measure(chip: str, shape: str, way: str) -> dict[str, object]:
    device = topologies.get_topology_desc(TOPOLOGY[chip], platform="tpu").devices[0]
    A, _, N, E = SHAPES[shape]
    given = arguments(way, shape, SingleDeviceSharding(device))
    started = time.perf_counter()
    compiled = jax.jit(WAYS[way][bool(E)]).lower(*given).compile()
    compile_s = time.perf_counter() - started
    costs, text = compiled.cost_analysis(), compiled.as_text()
    least = sum(one.size * one.dtype.itemsize for one in given) + A * N * 4
    cycles = [int(found) for found in re.findall(r'"estimated_cycles":"(\d+)"', text)]
    return {
        "chip": chip,
        "shape": shape,
        "way": way,
        "least_bytes": least,
        "bytes": int(costs["bytes accessed"]),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "seconds": costs.get("optimal_seconds"),
        "xla_cycles": sum(cycles),
        "roof_s": least / BANDWIDTH[chip],
        "custom_calls": len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
        "wide_arrays": wide_arrays(text, given[1].size * (1 if way == "bfloat16" else 2)),
        "compile_s": round(compile_s, 1),
    }


def wide_arrays(hlo: str, num_weights: int) -> list[str]:
    """Arrays of 16 bits or more with as many elements as the weight, wherever they live."""
    found = set()
    for kind, dims in re.findall(r"\b(bf16|f16|f32|s32|u32|s16|u16)\[([\d,]+)\]", hlo):
        size = 1
        for part in dims.split(","):
            size *= int(part)
        found |= {f"{kind}[{dims}]"} if size >= num_weights else set()
    return sorted(found)


def line(row: dict[str, object]) -> str:
    ratio = row["bytes"] / row["least_bytes"]
    text = f"{row['chip']:6} {row['shape']:13} {row['way']:9} {row['least_bytes'] / 1e6:8.1f} {ratio:7.3f}"
    text += f" {row['temp_bytes'] / 1e6:8.1f} {row['roof_s'] * 1e6:8.1f} {(row['seconds'] or 0) * 1e6:10.1f}"
    return text + f" {row['xla_cycles'] / 1e3:10.0f} {row['compile_s']:8.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", default=",".join(TOPOLOGY))
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--json", help="file to write the measurements to")
    args = parser.parse_args()
    print("chip   shape         way       least MB   bytes  temp MB  roof us  estimate us  XLA kcycles  compile s")
    rows = []
    for chip in args.chips.split(","):
        for shape in args.shapes.split(","):
            for way in args.ways.split(","):
                rows.append(measure(chip, shape, way))
                print(line(rows[-1]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
