"""How far two correct backends scatter around the ruler: seeds x families x {float32, bfloat16}, on CPU.

Prints, per family and dtype, the largest ratio of errors by tensor and by token (the token's floor as in parity.ruler),
and the largest share of the lid that was used. The constants of parity.ruler are set from this.

    python benchmarks/calibrate_ruler.py --seeds 40
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from parity.backends import open_backend
from parity.compare import compare
from parity.record import record_model
from parity.record_oracle import record_oracle
from parity.ruler import LIMITS, token_floor
from parity.trace import Trace
from parity.zoo import make_checkpoint, prompts


def token_errors(trace: Trace, oracle: Trace, name: str) -> np.ndarray:
    mask = trace.mask
    difference = trace.tensors[name][mask].astype(np.float64) - oracle.tensors[name][mask]
    return np.linalg.norm(difference, axis=-1) / np.linalg.norm(oracle.tensors[name][mask], axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--families", nargs="+", default=["qwen3", "qwen3-moe", "qwen3_5", "qwen3_5-moe", "gemma3"])
    args = parser.parse_args()
    backends = {name: open_backend(name) for name in ("jax", "torch")}
    for family in args.families:
        for dtype in ("float32", "bfloat16"):
            by_tensor, by_token, lid_used, token_lid_used, verdicts = [], [], [], [], []
            limits = LIMITS[dtype]
            for seed in range(args.seeds):
                with tempfile.TemporaryDirectory() as scratch:
                    path = make_checkpoint(family, Path(scratch) / "c", seed=seed, dtype="BF16")
                    models = {name: backend.load(path, dtype=dtype) for name, backend in backends.items()}
                    checkpoint = models["jax"].checkpoint
                    inputs = prompts(checkpoint.config, padding=("left", "right")[seed % 2], seed=seed)
                    traces = {name: record_model(models[name], backend, inputs) for name, backend in backends.items()}
                    oracles = {
                        name: record_oracle(checkpoint, inputs, like=trace, probes=0) for name, trace in traces.items()
                    }
                    result = compare(traces["jax"], traces["torch"], oracles["jax"], oracle_b=oracles["torch"])
                verdicts.append(result.verdict)
                for name in traces["jax"].tensors:
                    if not name.startswith(("hidden_states.", "final", "logits")) or name == "hidden_states.0":
                        continue
                    a, b = (token_errors(traces[side], oracles[side], name) for side in ("jax", "torch"))
                    token_lid = limits.token_lid(checkpoint.config.num_hidden_layers)
                    token_lid_used.append(max(a.max(), b.max()) / token_lid)
                    floor_a, floor_b = token_floor(a, limits.u), token_floor(b, limits.u)
                    by_token.append(max((a / np.maximum(b, floor_b)).max(), (b / np.maximum(a, floor_a)).max()))
                rows = [row for row in result.rows if row.e_a]
                by_tensor.append(max(row.ratio for row in rows))
                lid_used.append(
                    max(max(row.e_a, row.e_b) for row in rows) / limits.lid(checkpoint.config.num_hidden_layers)
                )
            passed = verdicts.count("PASS")
            print(
                f"{family:10} {dtype:9} seeds {args.seeds}: tensor max {max(by_tensor):.2f},"
                f" token max {max(by_token):.2f}"
                f" (p99 {np.percentile(by_token, 99):.2f}), lid used {max(lid_used):.2f},"
                f" token lid used {max(token_lid_used):.2f}, PASS {passed}"
            )


if __name__ == "__main__":
    main()
