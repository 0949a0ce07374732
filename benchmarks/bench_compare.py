"""Cold start of ``tandem compare`` on two 1 MB traces and an oracle, beside ``import numpy`` in the same run.

python benchmarks/bench_compare.py [--rounds 7]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from parity.trace import Trace, make_meta


def write(directory: Path) -> list[str]:
    rng = np.random.default_rng(0)
    exact = {f"hidden_states.{layer}": rng.standard_normal((2, 64, 64)) for layer in range(25)}
    exact |= {"final_hidden_state": rng.standard_normal((2, 64, 64)), "logits": 3 * rng.standard_normal((2, 64, 1200))}
    dtypes = {"jax": "float32", "torch": "float32", "oracle": "float64"}
    meta = {name: make_meta(backend=name, dtype=dtype, input_hash="same") for name, dtype in dtypes.items()}
    paths = []
    for name, document in meta.items():
        noise = 0.0 if name == "oracle" else 1e-7
        tensors = {key: value * (1 + noise * rng.standard_normal(value.shape)) for key, value in exact.items()}
        if noise:
            tensors = {key: value.astype(np.float32) for key, value in tensors.items()}
        paths.append(str(Trace(tensors, document).save(directory / name)))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch:
        jax, torch, oracle = write(Path(scratch))
        commands = {
            "import numpy": [sys.executable, "-c", "import numpy"],
            "tandem compare": [sys.executable, "-m", "parity.cli", "compare", jax, torch, "--oracle", oracle],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                seconds[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(found)) for name, found in seconds.items()}
    for name, median in medians.items():
        print(f"{name:15} median {median:.2f} s, best {min(seconds[name]):.2f} s")
    print(f"tandem compare / import numpy: {medians['tandem compare'] / medians['import numpy']:.1f}x")


if __name__ == "__main__":
    main()
