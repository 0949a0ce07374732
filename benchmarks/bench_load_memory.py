"""Peak host memory of loading a 2 GiB bfloat16 checkpoint on CPU, each loader in a process of its own.

Bar: parameters + 256 MiB. transformers stands beside it as the named peer. Growth is VmHWM after the load minus VmRSS
before it (frameworks imported, nothing loaded); seconds are reported for orientation, machines are noisy.

    python benchmarks/bench_load_memory.py [--gib 2] [--json FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np

CHILD = """
import json, sys, time
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
loader, path = sys.argv[1:]
if loader == "jax":
    import jax, jax_models
    jax.devices()
    load = lambda: jax.block_until_ready(jax_models.load(path).weights)
elif loader == "torch":
    import torch_models
    load = lambda: torch_models.load(path)
else:
    import torch
    from transformers import AutoModelForCausalLM
    import transformers.models.qwen3.modeling_qwen3
    def load():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        total = sum(float(p.view(-1)[::1024].float().sum()) for p in model.parameters())  # its pages are mapped lazily
        return model, sum(p.view(torch.int16).sum().item() for p in model.parameters())
before = status("VmRSS")
start = time.perf_counter()
kept = load()
seconds = time.perf_counter() - start
print(json.dumps({"loader": loader, "peak_growth_bytes": status("VmHWM") - before, "seconds": seconds}))
"""


def write(directory: Path, gib: float) -> int:
    from loaders.plan import specs_of
    from loaders.stage import Stage
    from loaders.writer import TensorType, write_checkpoint
    from parity.zoo import zoo_config

    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8}
    sizes |= {"head_dim": 128, "vocab_size": 32768, "num_hidden_layers": max(1, round((gib * 2**30 - 2.7e8) / 1.007e8))}
    document = zoo_config("qwen3", dtype="BF16", **sizes)
    from loaders.config import config_from_json

    config, problems = config_from_json(document)
    assert config is not None, problems
    plan = {s.tensor: TensorType("BF16", spec.tensor_shape) for spec in specs_of(config, Stage()) for s in spec.sources}
    rng = np.random.default_rng(0)

    def read(name: str) -> np.ndarray:
        bits = rng.integers(0, 2**14, plan[name].shape, dtype=np.uint16)
        return bits.view(ml_dtypes.bfloat16)

    write_checkpoint(directory, plan, read, config=document, max_file_bytes=700 << 20)
    return sum(2 * int(np.prod(tensor.shape)) for tensor in plan.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        parameters = write(Path(scratch) / "c", args.gib)
        for turn in range(args.rounds):
            for loader in ("jax", "torch", "transformers")[:: 1 if turn % 2 == 0 else -1]:
                done = subprocess.run(
                    [sys.executable, "-c", CHILD, loader, f"{scratch}/c"], capture_output=True, text=True, check=True
                )
                rows.append(json.loads(done.stdout.splitlines()[-1]))
    mib = 2**20
    print(f"parameters {parameters / mib:,.0f} MiB, bar {parameters / mib + 256:,.0f} MiB")
    summary = {}
    for loader in ("jax", "torch", "transformers"):
        mine = [row for row in rows if row["loader"] == loader]
        peak = max(row["peak_growth_bytes"] for row in mine)
        seconds = float(np.median([row["seconds"] for row in mine]))
        summary[loader] = {"peak_growth_bytes": peak, "ratio": peak / parameters, "median_seconds": seconds}
        print(f"{loader:13} peak growth {peak / mib:8,.0f} MiB = {peak / parameters:.3f}x parameters, {seconds:.2f} s")
    for loader in ("jax", "torch"):
        ratio = summary[loader]["peak_growth_bytes"] / summary["transformers"]["peak_growth_bytes"]
        print(f"{loader} / transformers: {ratio:.2f}x the peak memory")
    if args.json:
        args.json.write_text(json.dumps({"parameters_bytes": parameters, "loaders": summary}, indent=2) + "\n")


if __name__ == "__main__":
    main()
