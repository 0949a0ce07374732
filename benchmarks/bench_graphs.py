"""Decode steps a second, eager beside a graph, in turns in the same run; and what the check before a replay costs.

python benchmarks/bench_graphs.py [--device cuda] [--layers 12] [--hidden 256] [--rows 1] [--rounds 7] [--steps 20]

On a CPU the "graph" is the recorded replay that tests use: its ratio says what recording costs, nothing of CUDA.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import torch_models
from parity.zoo import make_checkpoint

PROMPT = 16


def seconds_of(step: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor, steps: int) -> float:
    """For so many greedy steps, each from the token of the one before."""
    start = time.perf_counter()
    for _ in range(steps):
        logits = step(logits.argmax(-1))
    logits.cpu()  # waits for the device
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="qwen3")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    for name, value in {"layers": 12, "hidden": 256, "rows": 1, "rounds": 7, "steps": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    sizes = {"num_hidden_layers": options.layers, "hidden_size": options.hidden}
    with tempfile.TemporaryDirectory() as scratch:
        stored = {"float32": "F32", "bfloat16": "BF16"}[options.dtype]
        path = make_checkpoint(options.model, Path(scratch) / "model", dtype=stored, **sizes)
        model = torch_models.load(path, device=options.device)
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, (options.rows, PROMPT))
    found: dict[str, list[float]] = {"eager": [], "graph": []}
    for turn in range(options.rounds + 1):
        logits_BV, cache = model.prefill(prompt, max_new_tokens=options.steps)
        eager_s = seconds_of(lambda token_B, cache=cache: model.decode(token_B, cache)[0], logits_BV, options.steps)
        logits_BV, batch = model.graphs.prefill(prompt, max_new_tokens=options.steps)
        graph_s = seconds_of(batch.decode, logits_BV, options.steps)
        if turn:  # the first warms up, and captures
            found["eager"].append(eager_s)
            found["graph"].append(graph_s)
    (graph,) = model.graphs.capture(options.rows, PROMPT + options.steps)
    checks = []
    for _ in range(100):
        start = time.perf_counter()
        graph.check()
        checks.append(time.perf_counter() - start)
    kind = "CUDA graph" if model.device.type == "cuda" else "recorded replay on the CPU, not a CUDA graph"
    where = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
    print(f"{options.model}, {options.layers} layers, {options.rows} rows, {options.dtype}, {where}; graph = {kind}")
    medians = {name: float(np.median(seconds)) / options.steps for name, seconds in found.items()}
    for name, step_s in medians.items():
        print(f"{name:6} median {1e3 * step_s:.2f} ms a step, {options.rows / step_s:.0f} tokens/s")
    num_tensors = sum(len(watch.census) for watch in graph.watches)
    print(f"check before a replay: median {1e6 * float(np.median(checks)):.0f} us for {num_tensors} tensors")
    print(f"graph / eager: {medians['eager'] / medians['graph']:.2f}x the tokens/s")


if __name__ == "__main__":
    main()
