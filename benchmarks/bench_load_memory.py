"""Peak host memory of loading a 2 GiB bfloat16 checkpoint on CPU, each loader in a process of its own.

Bar: parameters + 256 MiB; with ``--experts``, a mixture whose experts come in that form, + the largest tensor.
``--runai`` reads through runai-model-streamer. transformers stands beside it as the named peer, for what it loads too.
Growth is VmHWM after the load minus VmRSS before it (frameworks imported, nothing loaded); seconds are reported for
orientation, machines are noisy.

    python benchmarks/bench_load_memory.py [--gib 2] [--experts FORM] [--runai] [--json FILE]
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
    import transformers.models.qwen3.modeling_qwen3, transformers.models.qwen3_5_moe.modeling_qwen3_5_moe
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


DENSE = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8}
MIXTURE = {
    **{"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "num_experts": 64},
    **{"moe_intermediate_size": 768, "shared_expert_intermediate_size": 768, "num_experts_per_tok": 8},
}
COMMON = {"head_dim": 128, "vocab_size": 32768}
LAYER_BYTES = {"qwen3": 1.007e8, "qwen3_5-moe": 6.3e8}


def write(directory: Path, gib: float, experts: str | None) -> tuple[int, int]:
    """Bytes of all parameters, and of the largest tensor."""
    from loaders.config import config_from_json
    from loaders.expand import expand
    from loaders.families import family_module
    from loaders.writing.writer import TensorType, write_checkpoint
    from parity.zoo import zoo_config

    name = "qwen3_5-moe" if experts else "qwen3"
    layers = max(1, round((gib * 2**30 - 2.7e8) / LAYER_BYTES[name]))
    sizes = COMMON | (MIXTURE | {"layer_types": ["full_attention"] * layers} if experts else DENSE)
    document = zoo_config(name, dtype="BF16", num_hidden_layers=layers, **sizes)
    config, problems = config_from_json(document)
    assert config is not None, problems
    rules = [rule for rule in family_module(config.architecture).RULES if rule.form in ("", experts)]
    specs = expand(rules, config)
    plan = {placement.tensor: TensorType("BF16", spec.tensor_shape) for spec in specs for placement in spec.placements}
    rng = np.random.default_rng(0)

    def read(name: str) -> np.ndarray:
        bits = rng.integers(0, 2**14, plan[name].shape, dtype=np.uint16)
        return bits.view(ml_dtypes.bfloat16)

    write_checkpoint(directory, plan, read, config=document, max_file_bytes=700 << 20)
    found = [2 * int(np.prod(tensor.shape)) for tensor in plan.values()]
    return sum(found), max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--experts", choices=["fused", "fused transposed", "per expert"])
    parser.add_argument("--runai", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    loaders = ("jax", "torch") if args.experts == "fused transposed" or args.runai else ("jax", "torch", "transformers")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        parameters, largest = write(Path(scratch) / "c", args.gib, args.experts)
        address = f"{'runai://' if args.runai else ''}{scratch}/c"
        for turn in range(args.rounds):
            for loader in loaders[:: 1 if turn % 2 == 0 else -1]:
                done = subprocess.run(
                    [sys.executable, "-c", CHILD, loader, address], capture_output=True, text=True, check=True
                )
                rows.append(json.loads(done.stdout.splitlines()[-1]))
    mib = 2**20
    bar = parameters + 256 * mib + (largest if args.experts else 0)
    print(f"parameters {parameters / mib:,.0f} MiB, largest tensor {largest / mib:,.0f} MiB, bar {bar / mib:,.0f} MiB")
    summary = {}
    for loader in loaders:
        mine = [row for row in rows if row["loader"] == loader]
        peak = max(row["peak_growth_bytes"] for row in mine)
        seconds = float(np.median([row["seconds"] for row in mine]))
        summary[loader] = {"peak_growth_bytes": peak, "ratio": peak / parameters, "median_seconds": seconds}
        print(f"{loader:13} peak growth {peak / mib:8,.0f} MiB = {peak / parameters:.3f}x parameters, {seconds:.2f} s")
    for loader in loaders[:2] if len(loaders) > 2 else ():
        ratio = summary[loader]["peak_growth_bytes"] / summary["transformers"]["peak_growth_bytes"]
        print(f"{loader} / transformers: {ratio:.2f}x the peak memory")
    if args.json:
        args.json.write_text(json.dumps({"parameters_bytes": parameters, "loaders": summary}, indent=2) + "\n")


if __name__ == "__main__":
    main()
