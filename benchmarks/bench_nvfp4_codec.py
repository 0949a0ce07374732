"""Quantising bfloat16 weights to NVFP4 on the host: ours and ModelOpt's CPU path, by turns in one process.

python benchmarks/bench_nvfp4_codec.py [--megabytes 256] [--rounds 5] [--threads 2]
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable

import ml_dtypes
import numpy as np
import torch

from loaders.nvfp4 import dequantize, quantize

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

COLUMNS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of ours and of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    rows = options.megabytes * 1_000_000 // (2 * COLUMNS)
    w = rng.standard_normal((rows, COLUMNS), np.float32).astype(ml_dtypes.bfloat16)
    theirs = torch.from_numpy(w.view(np.int16)).view(torch.bfloat16)
    found, (packed, block, _) = quantize(w, threads=options.threads), NVFP4QTensor.quantize(theirs, 16)
    assert found.packed.tobytes() == packed._quantized_data.numpy().tobytes()
    assert found.block_scale.tobytes() == block.view(torch.uint8).numpy().tobytes()

    calls: dict[str, Callable[[], object]] = {
        "modelopt quantize": lambda: NVFP4QTensor.quantize(theirs, 16),
        "ours, 1 thread": lambda: quantize(w),
        f"ours, {options.threads} threads": lambda: quantize(w, threads=options.threads),
        "ours, divide": lambda: quantize(w, divide=True, threads=options.threads),
        "ours, dequantize": lambda: dequantize(found.packed, found.block_scale, found.global_scale),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    base = float(np.median(seconds["modelopt quantize"]))
    for name, taken in seconds.items():
        median = float(np.median(taken))
        rate = w.nbytes / median / 1e9
        print(f"{name:18} median {median:.2f} s, best {min(taken):.2f} s, {rate:.2f} GB/s bf16, {base / median:.1f}x")


if __name__ == "__main__":
    main()
