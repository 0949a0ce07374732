"""How fast and in how much memory a checkpoint of experts is loaded, beside the fastest loaders of others.

2.8 GB of bfloat16 by default: 807 tensors in 4 files. Every run is a process of its own, forked when the frameworks are
imported and nothing is loaded; loaders take turns, in another order every round, and medians are given. In a
section all have the same destinations, and the same bytes have to be in them at the end. ``limit`` is two threads that
read the files into warm buffers and keep nothing; ``(reading alone)`` two that read them into as much memory as a load
does. Ours go in through the front door only. Peers that are not installed are left out, and that is said.

    python benchmarks/bench_load.py [--gb 2.8] [--rounds 5] [--sections reload,torch,jax,experts,cold] [--json FILE]

Quote ratios of one section, not GB/s: neighbours move those tenfold. ``extra`` is the growth of the process's anonymous
memory beyond the destinations, at its peak, in multiples of the model.
"""

import argparse
import ctypes
import importlib
import json
import os
import random
import resource
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
from loading import PIECE, Case, Run, sections, write_noise

from loaders.reading.memory import aligned_empty
from parity.zoo import zoo_config

CONFIG = {
    **{"hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4},
    **{"head_dim": 128, "vocab_size": 32768, "moe_intermediate_size": 768, "num_experts_per_tok": 8},
}
POPULATE_WRITE = 23  # Linux's MADV_POPULATE_WRITE, which Python does not name
EXPERT_BYTES, OTHER_BYTES = 3 * 768 * 2048 * 2 * 4, 3.5e8
# section -> what is compared: ours, at least this much faster than the fastest peer of a kind
BARS = {
    "reload": [
        ("ours: stream(into=)", "peers", 1.25),
        ("ours: stream(into=)", "limit", 0.85),  # whose buffers stay in a cache of 16 MiB and more
        ("ours: stream(into=)", "(reading alone)", 0.85),
    ],
    "torch": [("ours: torch_models.load", "peers", 1.0)],
    "jax": [("ours: jax_models.load", "peers", 1.5)],
    "experts": [("ours: stream(into=)", "np.stack", 4.0)],
    "cold": [
        ("ours: stream(into=), direct://", "runai, its default", 0.95),  # neither leaves anything in the page cache
        ("ours: stream(into=)", "runai, sync_buffered", 0.95),  # both do
    ],
}


NO_LOADERS = ("limit", "(reading alone)")  # they keep nothing that could be compared


def write(directory: Path, gb: float) -> Path:
    experts = max(8, round((gb * 1e9 - OTHER_BYTES) / EXPERT_BYTES))
    document = zoo_config("qwen3-moe", dtype="BF16", num_experts=experts, mlp_only_layers=[], **CONFIG)
    return write_noise(directory, document, num_files=4)


def run(path: str, section: str, name: str, gb: float) -> dict[str, float] | str:
    """One loader in a child of its own; what it measured, or why it could not."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            timed = sections()[section][name](Case(path))
            own_memory()
            provide_memory(gb)
            found = measured(timed, gb)
        except BaseException as error:  # noqa: BLE001
            traceback.print_exc()
            found = f"{type(error).__name__}: {error}"
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return json.loads(found or '"it died"')


def own_memory() -> None:
    """Copy what is shared with the parent now, not at the first write to each page, which only a fork has to wait for.

    Of a load into torch, whose Python is spread over many pages, that took a tenth.
    """
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.split()[1] == "rw-p"]
    for start, stop in ((int(start, 16), int(stop, 16)) for start, stop in ranges):
        advise(start, stop - start, POPULATE_WRITE)


def provide_memory(gb: float) -> None:
    """Have the host give free memory to this machine, right before the clock: seconds later it takes it back."""
    aligned_empty((int(gb * 1.3e9),), np.dtype(np.uint8))[:] = 1


def measured(timed: Run, gb: float) -> dict[str, float]:
    before = peak = anonymous()
    is_done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, cpu = time.perf_counter(), _cpu()
    arrays = timed()
    seconds, cpu = time.perf_counter() - start, _cpu() - cpu
    peak = max(peak, anonymous())
    is_done.set()
    watcher.join()
    return {
        **{"gb_per_s": gb / seconds, "cpu_s_per_gb": cpu / gb, "extra": (peak - before) / (gb * 1e9)},
        "checksum": checksum(arrays),
    }


def anonymous() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def checksum(arrays: list[np.ndarray]) -> int:
    """Of all bytes in words of two, in whatever order: the same for experts in stacks and one by one."""
    total = 0
    for array in arrays:
        flat = array.reshape(-1).view(np.uint16)
        for start in range(0, flat.size, 1 << 16):  # sums of 32 bits do not overflow, and are four times as quick
            total += int(flat[start : start + (1 << 16)].sum(dtype=np.uint32))
    return total


def prepare(path: str, section: str) -> None:
    """The page cache cold or warm."""
    for file in Path(path).glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        if section == "cold":
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            buffer = bytearray(PIECE)
            for start in range(0, os.fstat(descriptor).st_size, PIECE):
                os.preadv(descriptor, [buffer], start)
        os.close(descriptor)


def measure(path: str, section: str, rounds: int, gb: float) -> dict[str, dict[str, float]]:
    rows: dict[str, list[dict[str, float]]] = {}
    left = [name for name in sections()[section] if not (name.startswith("runai") and not has_runai())]
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(left, len(left)):  # what a loader comes after decides which memory it is given
            prepare(path, section)
            found = run(path, section, name, gb)
            if isinstance(found, str):
                print(f"{section}: {name} failed: {found}")
                continue
            rows.setdefault(name, []).append(found)
    sums = {row.pop("checksum") for name, found in rows.items() for row in found if name not in NO_LOADERS}
    if len(sums) > 1:
        raise SystemExit(f"{section}: the loaders disagree about the bytes: {sorted(sums)}")
    return {
        name: {key: float(np.median([row[key] for row in found])) for key in found[0] if key != "checksum"}
        for name, found in rows.items()
    }


def has_runai() -> bool:
    return importlib.util.find_spec("runai_model_streamer") is not None


def report(section: str, rows: dict[str, dict[str, float]]) -> list[str]:
    lines = [f"{section:38} {'GB/s':>6} {'of limit':>8} {'CPU s/GB':>8} {'extra':>6}"]
    limit = rows.get("limit", {}).get("gb_per_s")
    for name, row in rows.items():
        share = f"{row['gb_per_s'] / limit:8.2f}" if limit else f"{'-':>8}"
        lines.append(f"{name:38} {row['gb_per_s']:6.2f} {share} {row['cpu_s_per_gb']:8.2f} {row['extra']:6.2f}")
    for ours, against, bar in BARS[section]:
        peers = [one for one in rows if not one.startswith(("ours", "limit", "("))] if against == "peers" else [against]
        peers = [one for one in peers if one in rows]
        if ours in rows and peers:
            fastest = max(peers, key=lambda one: rows[one]["gb_per_s"])
            ratio = rows[ours]["gb_per_s"] / rows[fastest]["gb_per_s"]
            lines.append(f"  {ratio:.2f} x {fastest} (bar {bar}): {'met' if ratio >= bar else 'MISSED'}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sections", type=lambda text: text.split(","), default=list(BARS))

    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "os.fork")
    for name in ("torch_models", "torch_models.qwen3", "jax_models", "jax_models.qwen3"):
        importlib.import_module(name)  # before the fork, and nothing of them started
    if not has_runai():
        print("runai-model-streamer is not installed and left out: pip install 'tandem[runai]'")
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = str(write(Path(scratch) / "checkpoint", args.gb))
        num_tensors, gb = Case(path).size()
        print(f"{num_tensors} tensors, {gb:.2f} GB, {args.rounds} rounds")
        for section in args.sections:
            results[section] = measure(path, section, args.rounds, gb)
            print(*report(section, results[section]), sep="\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
