"""Memory of an NVFP4 model, resident and while it is reloaded, on CPU, each backend in a process of its own.

Bars: resident weights at most 1.02x the checkpoint's bytes, after a load and after every reload; a reload's peak at
most that and the largest layer. JAX reloads with ``donate=True``, which is what keeps it from holding both versions.
Peak is VmHWM, reset before each reload, minus VmRSS before it. The named peer is a reload that holds both: JAX's own,
without it.

    python benchmarks/bench_reload_memory.py [--mib 512] [--reloads 4] [--json FILE]
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
import json, sys
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
how, reloads, *paths = sys.argv[1:]
if how == "torch":
    import torch_models
    from torch_models.census import tensors_of
    from torch_models.aliased_storage import remembered_bytes
    model = torch_models.load(paths[0])
    def resident(model):
        storages = [tensor.untyped_storage() for _, tensor in tensors_of(model)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) + remembered_bytes(model)
    reload = lambda model, path: model.update_weights_from_disk(path)
else:
    import jax, jax_models
    model = jax_models.load(paths[0])
    resident = lambda model: sum(array.nbytes for array in jax.live_arrays())
    reload = lambda model, path: model.update_weights_from_disk(path, donate=how == "jax")
found = {"how": how, "resident_bytes": [resident(model)], "peak_growth_bytes": []}
for number in range(int(reloads)):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    model = reload(model, paths[(number + 1) % 2])
    found["peak_growth_bytes"].append(status("VmHWM") - before)
    found["resident_bytes"].append(resident(model))
print(json.dumps(found))
"""


def write(directory: Path, mib: int, seed: int) -> tuple[int, int]:
    """An NVFP4 mixture of experts of random codes; its bytes, and those of its largest layer."""
    from loaders.config import config_from_json
    from loaders.quantization.quantize import quantized
    from loaders.reading.plan import specs_of
    from loaders.stage import Stage
    from loaders.writing.writer import TensorType, write_checkpoint
    from parity.zoo import zoo_config

    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    sizes |= {"vocab_size": 8192, "num_experts": 16, "moe_intermediate_size": 768, "mlp_only_layers": []}
    sizes |= {"num_hidden_layers": max(2, round((mib - 34) / 23))}
    document = zoo_config("qwen3-moe", dtype="BF16", **sizes)
    config, problems = config_from_json(document)
    assert config is not None, problems
    plan = {
        s.tensor: TensorType("BF16", spec.tensor_shape) for spec in specs_of(config, Stage()) for s in spec.placements
    }
    rng = np.random.default_rng(seed)

    def read(name: str) -> np.ndarray:
        return rng.standard_normal(plan[name].shape, np.float32).astype(ml_dtypes.bfloat16)

    from loaders import open_checkpoint

    plain = directory.parent / f"{directory.name}-plain"
    write_checkpoint(plain, plan, read, config=document)
    view = quantized(open_checkpoint(plain))
    beside = view.quantization_document
    write_checkpoint(directory, view.tensors, view.read, config=view.config_document, quantization=beside)
    layers: dict[str, int] = {}
    for name, info in view.tensors.items():
        layer = ".".join(name.split(".")[:3])
        layers[layer] = layers.get(layer, 0) + info.num_bytes
    return view.num_bytes, max(layers.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--reloads", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows, mib = {}, 2**20
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / letter for letter in "AB"]
        weights, largest = [write(path, args.mib, seed) for seed, path in enumerate(paths)][0]
        for how in ("torch", "jax", "jax, both held"):
            command = [sys.executable, "-c", CHILD, how, str(args.reloads), *map(str, paths)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows[how] = json.loads(done.stdout.splitlines()[-1])
    print(f"checkpoint {weights / mib:,.0f} MiB, largest layer {largest / mib:,.0f} MiB")
    for how, row in rows.items():
        resident, peak = max(row["resident_bytes"]), max(row["peak_growth_bytes"])
        print(f"{how:16} resident {resident / weights:.4f}x, peak of a reload + {peak / mib:,.0f} MiB", end="")
        print(f" = {peak / largest:.2f} of the largest layer")
    ratio = max(rows["jax"]["peak_growth_bytes"]) / max(rows["jax, both held"]["peak_growth_bytes"])
    print(f"donating / holding both: {ratio:.2f}x the growth")
    if args.json:
        found = {"checkpoint_bytes": weights, "largest_layer_bytes": largest, "backends": rows}
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
