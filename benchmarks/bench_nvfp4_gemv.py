"""Decode steps' products at Qwen3-8B's shapes: NVFP4 weights in Triton beside bfloat16 ones in torch, on one device.

python benchmarks/bench_nvfp4_gemv.py [--rows 1 8] [--rounds 50] [--out results]

In turns in the same run, each timed alone by CUDA events after the L2 cache was overwritten, replayed from a CUDA graph
so that launches from Python are not what is timed; medians. --out PATH writes PATH.json and PATH.md. Exits with 5 where
there is no CUDA device.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from torch_models.kernels import nvfp4_reference, nvfp4_triton

SHAPES = {  # N, K
    "q_proj": (4096, 4096),
    "k_proj, v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj, up_proj": (12288, 4096),
    "down_proj": (4096, 12288),
}
NO_DEVICE = 5
FLUSH_BYTES = 512 << 20  # several times the largest L2
ROOFLINE = 2 / (0.5 + 1 / 16)  # bytes of a bfloat16 weight by those of its code and its share of a scale: 3.56


def captured(program: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        program()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = program()
    return graph, out


def seconds_in_turns(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, float]:
    """Median seconds of a replay of each."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds + 3):  # the first three warm up
        for name, graph in graphs.items():
            flush.fill_(turn % 2)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 3:
                found[name].append(start.elapsed_time(end) / 1e3)
    return {name: float(np.median(seconds)) for name, seconds in found.items()}


def measure(name: str, rows: int, rounds: int) -> dict[str, float | int | str]:
    num_rows, depth = SHAPES[name]
    rng = np.random.default_rng(0)
    packed = torch.from_numpy(rng.integers(0, 256, (num_rows, depth // 2), np.uint8)).cuda()
    # scales from 0.5 to 15: sums of any size would do, but not infinite ones
    scale = torch.from_numpy(rng.integers(48, 88, (num_rows, depth // 16), np.uint8)).view(torch.float8_e4m3fn).cuda()
    alpha = torch.tensor(1e-3, device="cuda")
    weight = nvfp4_reference.dequantized(packed, scale, torch.bfloat16)
    x = torch.from_numpy(rng.standard_normal((rows, depth), np.float32)).cuda().bfloat16()
    kept = {
        "nvfp4": captured(lambda: nvfp4_triton.matmul(x, packed, scale, alpha)),
        "bfloat16": captured(lambda: F.linear(x, weight)),
    }
    seconds = seconds_in_turns({name: graph for name, (graph, _) in kept.items()}, rounds)
    wide = nvfp4_reference.dequantized(packed, scale, torch.float32).double()
    expected = (x.double() @ wide.T) * alpha.double()
    error = float((kept["nvfp4"][1] - expected).norm() / expected.norm())
    assert error <= 2e-6 + 2e-9 * depth, f"the product is wrong: relative error {error}"  # tensor cores truncate
    stored = packed.nbytes + scale.nbytes
    return {
        "name": name,
        "N": num_rows,
        "K": depth,
        "rows": rows,
        "nvfp4_us": 1e6 * seconds["nvfp4"],
        "bfloat16_us": 1e6 * seconds["bfloat16"],
        "ratio": seconds["bfloat16"] / seconds["nvfp4"],
        "nvfp4_GBps": stored / seconds["nvfp4"] / 1e9,
        "bfloat16_GBps": weight.nbytes / seconds["bfloat16"] / 1e9,
    }


def table(results: list[dict[str, float | int | str]]) -> str:
    lines = ["| product | N | K | rows | NVFP4, us | bfloat16, us | bfloat16 / NVFP4 | NVFP4, GB/s | bfloat16, GB/s |"]
    lines.append("|" + "---|" * 9)
    for r in results:
        cells = [r["name"], r["N"], r["K"], r["rows"], f"{r['nvfp4_us']:.1f}", f"{r['bfloat16_us']:.1f}"]
        cells += [f"{r['ratio']:.2f}x", f"{r['nvfp4_GBps']:.0f}", f"{r['bfloat16_GBps']:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available() or not nvfp4_triton.is_available(torch.device("cuda")):
        print("no CUDA device of capability 8.0 with triton: nothing measured")
        sys.exit(NO_DEVICE)
    results = [measure(name, rows, options.rounds) for rows in options.rows for name in SHAPES]
    text = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, medians of {options.rounds}\n\n{table(results)}\n"
    )
    text += f"\nroofline: {ROOFLINE:.2f}x, by the bytes of the weights\n"
    print(text)
    if options.out:
        report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rounds": options.rounds}
        report |= {"roofline": ROOFLINE, "results": results}
        options.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
