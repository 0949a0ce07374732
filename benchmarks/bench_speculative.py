"""Tokens per second with and without the draft, on a small model whose draft is often right, in the same run.

python benchmarks/bench_speculative.py [--backend jax|torch] [--rounds 7] [--rows 1] [--tokens 64]

The two take turns, so that whatever slows the machine slows both. A tiny model on a CPU shows what the loop costs, not
what a draft saves where reading the weights is what takes the time.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from parity.backends import open_backend
from parity.zoo.draft import make_drafting_checkpoint

SIZES = {"hidden_size": 256, "intermediate_size": 768, "vocab_size": 4096}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("jax", "torch"), action="append")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--quiet", type=float, default=0.01, help="how little the draft and the model differ")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = make_drafting_checkpoint("qwen3_5", Path(scratch) / "model", quiet=args.quiet, **SIZES)
        for name in args.backend or ("jax", "torch"):
            backend = open_backend(name, args.device)
            measure(backend, backend.load(path, dtype=args.dtype, mtp=True), args)


def measure(backend, model, args: argparse.Namespace) -> None:
    ids_BT = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (args.rows, 16))
    drafts = {f"K={K}": {"draft": model.draft, "draft_tokens": K} for K in args.draft_tokens}
    choices = {"no draft": {}} | drafts
    seconds: dict[str, list[float]] = {what: [] for what in choices}
    tokens = {}
    with backend.scope():
        for turn in range(args.rounds + 1):  # the first compiles
            for what, options in choices.items():
                start = time.perf_counter()
                tokens[what] = backend.to_numpy(model.generate(ids_BT, None, args.tokens, ignore_eos=True, **options))
                if turn:
                    seconds[what].append(time.perf_counter() - start)
    plain = float(np.median(seconds["no draft"]))
    made = tokens["no draft"].size
    print(f"{backend.name} on {backend.device}, {model.dtype}, {args.rows} rows, {args.tokens} tokens each")
    print(f"  no draft  {made / plain:8.0f} tokens/s")
    for what, options in drafts.items():
        median = float(np.median(seconds[what]))
        ratio = np.median(np.array(seconds["no draft"]) / np.array(seconds[what]))
        length = options["draft"].report.acceptance_length
        differing = int((tokens[what] != tokens["no draft"]).sum())
        print(
            f"  {what:8}  {made / median:8.0f} tokens/s, {ratio:.2f}x, acceptance length {length:.2f},"
            f" {differing} tokens differ"
        )


if __name__ == "__main__":
    main()
