"""How fast a checkpoint comes to a CUDA device, beside other loaders that put it there.

    python benchmarks/bench_load_cuda.py [--config benchmarks/configs/qwen3-8b.json] [--rounds 3] [--json FILE]

Every run is a process of its own in which CUDA has begun and the page cache is warm; loaders take turns, in another
order every round; medians. The same bytes have to be on the device at the end. ``limit`` copies as many from
page-locked memory that is there already: what the bus carries. Peers that are not installed are left out, and that is
said. Exits with 5 where there is no CUDA device.
"""

import argparse
import importlib.util
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from loading import write_noise

NO_DEVICE = 5
PIECE = 1 << 30
Timed = Callable[[], list[torch.Tensor]]


def limit(path: str, files: list[str]) -> Timed:
    num_bytes = sum(Path(file).stat().st_size for file in files)
    source = torch.ones(PIECE, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(PIECE, dtype=torch.uint8, device="cuda")

    def run() -> list[torch.Tensor]:
        for start in range(0, num_bytes, PIECE):
            size = min(PIECE, num_bytes - start)
            device[:size].copy_(source[:size], non_blocking=True)
        return []

    return run


def ours(path: str, files: list[str]) -> Timed:
    import torch_models
    import torch_models.qwen3  # noqa: F401

    return lambda: list(torch_models.load(path, device="cuda").parameters())


def ours_again(path: str, files: list[str]) -> Timed:
    import torch_models

    model = torch_models.load(path, device="cuda")
    return lambda: list(model.update_weights_from_disk(path).parameters())


def safetensors(path: str, files: list[str]) -> Timed:
    from safetensors.torch import load_file

    return lambda: [tensor for file in files for tensor in load_file(file, device="cuda").values()]


def safetensors_again(path: str, files: list[str]) -> Timed:
    from safetensors.torch import load_file

    live = {name: tensor for file in files for name, tensor in load_file(file, device="cuda").items()}

    def run() -> list[torch.Tensor]:
        for file in files:
            for name, tensor in load_file(file, device="cuda").items():
                live[name].copy_(tensor)
        return list(live.values())

    return run


def runai(path: str, files: list[str]) -> Timed:
    from runai_model_streamer import SafetensorsStreamer

    def run() -> list[torch.Tensor]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(files)
            return [tensor.to("cuda") for _, tensor in streamer.get_tensors()]

    return run


def fastsafetensors(path: str, files: list[str]) -> Timed:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), "cuda:0", nogds=True)

    def run() -> list[torch.Tensor]:
        loader.add_filenames({0: files})
        buffer = loader.copy_files_to_device()
        return [buffer.get_tensor(name) for name in loader.get_keys()]

    return run


def instanttensor(path: str, files: list[str]) -> Timed:
    from instanttensor import safe_open

    def run() -> list[torch.Tensor]:
        with safe_open(files, framework="pt", device=0) as opened:
            return [tensor.clone() for _, tensor in opened.tensors()]  # they are lent

    return run


LOADERS = {
    "limit": (limit, "torch"),
    "ours: torch_models.load": (ours, "torch"),
    "safetensors.torch.load_file": (safetensors, "safetensors"),
    "runai, and to the device": (runai, "runai_model_streamer"),
    "fastsafetensors, no GDS": (fastsafetensors, "fastsafetensors"),
    "instanttensor, and clone": (instanttensor, "instanttensor"),
    "ours: update_weights_from_disk": (ours_again, "torch"),
    "safetensors.torch.load_file, and copy": (safetensors_again, "safetensors"),
}
AGAIN = {"ours: update_weights_from_disk", "safetensors.torch.load_file, and copy"}


def child(name: str, path: str) -> None:
    files = sorted(map(str, Path(path).glob("*.safetensors")))
    torch.zeros(1, device="cuda")
    timed = LOADERS[name][0](path, files)
    torch.cuda.synchronize()
    start, cpu = time.perf_counter(), time.process_time()
    tensors = timed()
    torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    found = sum(int(tensor.view(torch.uint16).view(-1).sum(dtype=torch.int64)) for tensor in tensors)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_gb": peak, "sum": found}), flush=True)


def measured(name: str, path: str) -> dict[str, float] | str:
    command = [sys.executable, __file__, "--child", name, path]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return "it took longer than three minutes"
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if done.returncode == 0 and lines else done.stderr[-300:]


def report(rows: dict[str, dict[str, float]], gb: float) -> list[str]:
    lines = ["| loader | GB/s | seconds | CPU s/GB | peak of the process, GB |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        figures = f"{gb / row['seconds']:.1f} | {row['seconds']:.2f} | {row['cpu'] / gb:.2f} | {row['peak_gb']:.1f}"
        lines.append(f"| {name} | {figures} |")
    lines.append("")
    for name in (one for one in rows if one.startswith("ours")):
        peers = [one for one in rows if one != "limit" and not one.startswith("ours")]
        if there := [peer for peer in peers if (peer in AGAIN) == (name in AGAIN)]:
            fastest = min(there, key=lambda peer: rows[peer]["seconds"])
            ratio = rows[fastest]["seconds"] / rows[name]["seconds"]
            of_limit = rows["limit"]["seconds"] / rows[name]["seconds"]
            lines.append(f"{name}: {ratio:.2f}x {fastest}, {of_limit:.2f} of the limit")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "configs" / "qwen3-8b.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured")
        sys.exit(NO_DEVICE)
    names = [name for name, (_, package) in LOADERS.items() if importlib.util.find_spec(package)]
    if left_out := LOADERS.keys() - names:
        print(f"not installed, and left out: {', '.join(sorted(left_out))}")
    found: dict[str, list[dict[str, float]]] = {}
    order = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        path = str(write_noise(Path(scratch) / "checkpoint", json.loads(args.config.read_text()), num_files=5))
        gb = sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) / 1e9
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.config.stem}, {gb:.2f} GB", flush=True)
        for _ in range(args.rounds):
            for name in order.sample(names, len(names)):
                one = measured(name, path)
                if isinstance(one, str):
                    print(f"{name} failed: {one}")
                else:
                    found.setdefault(name, []).append(one)
    sums = {row["sum"] for name, rows in found.items() if name != "limit" for row in rows}
    if len(sums) > 1:
        raise SystemExit(f"the loaders disagree about the bytes: {sorted(sums)}")
    keys = ("seconds", "cpu", "peak_gb")
    medians = {
        name: {key: float(np.median([row[key] for row in found[name]])) for key in keys}
        for name in LOADERS
        if name in found
    }
    print(*report(medians, gb), sep="\n")
    if args.json:
        args.json.write_text(json.dumps(medians, indent=2) + "\n")


if __name__ == "__main__":
    main()
