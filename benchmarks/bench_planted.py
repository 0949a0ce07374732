"""How many bugs that nobody fitted the kit to are caught, and is the layer named?

Plants each bug of ``benchmarks.planted``, runs what a user would run (``tandem run``, then the ``tandem bisect`` it
asks for; ``tandem lifecycle`` for what happens to weights) and prints the two rates: caught of those that can be seen,
and the right place named of those that are in one. All of them take about half an hour.

    python -m benchmarks.bench_planted [NAME ...] [--json FILE]
"""

import argparse
import contextlib
import json
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.planted import BUGS
from benchmarks.planted.plant import Bug, Weight, planted, with_weights
from loaders import open_checkpoint
from loaders.adapters.opening import open_adapter
from parity.backends import open_backend
from parity.bisect import bisect
from parity.compare import compare
from parity.comparison.outcome import Comparison
from parity.lifecycle.run import run_lifecycle
from parity.model_backend import ModelBackend
from parity.pairs import DECODE
from parity.record import default_inputs, record_model, row_alone
from parity.record_oracle import record_oracle
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint, prompts
from parity.zoo.adapters import make_adapter

SIDES = ("jax", "torch")


class Bench:
    """Checkpoints and what the clean code says, made once."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.kept = directory, {}

    def once(self, *key: Any, make: Any) -> Any:
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def checkpoint(self, bug: Bug, seed: int = 0) -> Path:
        quantized = {"quantization": ZooQuantization(), **block_sizes(bug.model)} if bug.quantized else {}
        where = self.directory / f"{len(self.kept)}"
        key = ("checkpoint", bug.model, bug.stored, bug.quantized, seed)
        return self.once(*key, make=lambda: make_checkpoint(bug.model, where, seed=seed, dtype=bug.stored, **quantized))

    def adapter(self, bug: Bug) -> Path | None:
        if not bug.options.get("adapter"):
            return None
        where = self.directory / f"{len(self.kept)}"
        return self.once("adapter", bug.model, make=lambda: make_adapter(self.checkpoint(bug), where))

    def recorded(
        self, bug: Bug, side: str, *, is_clean: bool, decode: int, row: int | None
    ) -> tuple[ModelBackend, Any, Any]:
        """A model, the trace of what it says, and of what."""
        backend, options = open_backend(side), dict(bug.options)
        weight_only, adapter = options.pop("weight_only", False), self.adapter(bug)
        padding = options.pop("padding", None)
        options.pop("adapter", None)
        path = self.checkpoint(bug)
        model = backend.load(path, dtype=bug.dtype, mtp=options.get("mtp", False), weight_only=weight_only)
        model = model if adapter is None else model.attach_lora(adapter)
        model = model if is_clean else with_weights(model, bug)
        inputs = prompts(model.config, padding=padding) if padding else default_inputs(model.checkpoint)
        inputs = inputs if row is None else row_alone(inputs, row)
        options = {"decode": decode} if decode else options
        return ModelBackend(model, backend, decode=decode), record_model(model, backend, inputs, **options), inputs

    def oracle(self, bug: Bug, inputs: Any, trace: Any, *, probes: int | None) -> Any:
        common = {"mtp": bug.options.get("mtp", False), "adapter": self.adapter(bug), "probes": probes}
        return record_oracle(open_checkpoint(self.checkpoint(bug)), inputs, like=trace, **common)


def forward(bench: Bench, bug: Bug, *, quick: bool) -> dict[str, Any]:
    """What ``tandem run`` says, and where ``tandem bisect`` finds it; ``quick``: only what run did not name."""
    with planted(bug):
        try:
            runs = [run(bench, bug)]
            for how in ({"decode": DECODE}, {"decode": DECODE, "row": 0}):
                if not runs[-1].is_caught and not bug.options.get("mtp"):
                    runs.append(run(bench, bug, **how))
        except (ValueError, RuntimeError) as error:  # our own code refuses it; anything else is a fault of this bench
            return {"is_caught": True, "verdict": f"refused: {error}", "by_run": True, "run": None, "bisect": None}
        one = next((each for each in runs if each.is_caught), runs[0])
        found, is_caught = one.found, one.is_caught
        said: dict[str, Any] = {"is_caught": is_caught, "by_run": is_caught, "decode": one.sides[0].decode}
        said |= {"verdict": f"{found.verdict} {found.cause or ''}".strip(), "summary": found.summary}
        said |= {"run": named_by_run(found) if is_caught else None, "bisect": None}
        is_named = isinstance(bug.edits[0], Weight) and found.verdict == "INVALID"  # the tensor, by its digest
        if is_named or (is_caught and (not bug.expected or (quick and said["run"] == bug.expected))):
            return said
        checkpoint, adapter = open_checkpoint(bench.checkpoint(bug)), bench.adapter(bug)
        where = [int(said["run"].removeprefix("layer "))] if str(said["run"]).startswith("layer") else []
        where = {"layer": where[0]} if is_caught and where else {"everywhere": True}  # as the report says
        where["adapter"] = None if adapter is None else open_adapter(adapter, checkpoint.config)
        with contextlib.suppress(ValueError):  # shapes that cannot be compared
            step = bisect(*one.sides, one.inputs, checkpoint=checkpoint, crossed=False, **where).culprit
            said["bisect"] = None if step is None else named(step.path)
            said |= {"step": None if step is None else step.path, "is_caught": is_caught or step is not None}
        return said


@dataclass(frozen=True)
class Run:
    """Both backends with a bug in one, on one batch, and what comparing them found."""

    sides: tuple[ModelBackend, ModelBackend]
    inputs: Any
    found: Comparison

    @property
    def is_caught(self) -> bool:
        """A person would be told that something is wrong."""
        return self.found.exit_code in (1, 3)


def run(bench: Bench, bug: Bug, *, decode: int = 0, row: int | None = None) -> Run:
    """One of the comparisons of ``tandem run``; the clean side and dense models' oracle are recorded once."""
    key = (bench.checkpoint(bug), bug.dtype, repr(bug.options), row)

    def recorded(side: str) -> Any:
        is_clean = bug.side not in (side, "both")
        make = lambda: bench.recorded(bug, side, is_clean=is_clean, decode=decode, row=row)  # noqa: E731
        return bench.once("clean", side, decode, *key, make=make) if is_clean else make()

    (a, ours, inputs), (b, theirs, _) = (recorded(side) for side in SIDES)
    is_sparse = any(name.startswith("routing") for name in ours.tensors)

    def oracle(side: str, trace: Any, probes: int | None) -> Any:
        if is_sparse and bug.side in (side, "both"):
            return bench.oracle(bug, inputs, trace, probes=probes)
        who = (side, decode) if is_sparse else "both"
        return bench.once("oracle", who, *key, make=lambda: bench.oracle(bug, inputs, trace, probes=None))

    found = compare(ours, theirs, oracle("jax", ours, None), oracle_b=oracle("torch", theirs, 0))
    return Run((a, b), inputs, found)


def life(bench: Bench, bug: Bug) -> dict[str, Any]:
    """What ``tandem lifecycle`` says."""
    paths = [bench.checkpoint(bug, seed) for seed in range(2)]
    with planted(bug), tempfile.TemporaryDirectory() as scratch:
        try:
            results = run_lifecycle(*paths, backends=(bug.side,), scratch=Path(scratch))
        except (ValueError, RuntimeError) as error:
            return {"is_caught": True, "verdict": f"refused: {error}", "run": None, "bisect": None}
    wrong = [f"{one.event}: {one.detail}" for one in results if one.verdict == "fail"]
    layers = set(re.findall(r"layers\.(\d+)", " ".join(wrong)))
    layer = f"layer {layers.pop()}" if len(layers) == 1 else None
    return {"is_caught": bool(wrong), "verdict": "; ".join(wrong)[:200], "run": layer, "bisect": None}


def named(path: str) -> str:
    """A tap or tensor as bugs say where they are."""
    if path.startswith("mtp."):
        return "mtp"
    if match := re.search(r"(?:hidden_states|layers)\.(\d+)", path):
        number = int(match[1]) - path.startswith("hidden_states")
        return "embed" if number < 0 else f"layer {number}"
    ends = {"final_hidden_state": "norm", "logits": "head", "lm_head": "head"}
    return ends.get(path, "embed" if "embed_tokens" in path else "norm" if path.endswith("norm") else path)


def named_by_run(found: Any) -> str | None:
    """Where ``tandem run`` says it begins."""
    if found.divergence is not None:
        return named(found.divergence.suspect or found.divergence.tensor)
    layers = set(re.findall(r"(?<!mtp\.)layers\.(\d+)", found.summary))
    ends = [end for name, end in (("lm_head", "head"), ("embed_tokens", "embed")) if name in found.summary]
    return f"layer {layers.pop()}" if len(layers) == 1 else ends[0] if ends and not layers else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of bugs, or how they begin; default: all")
    parser.add_argument("--quick", action="store_true", help="bisect only what run does not name")
    parser.add_argument("--json", type=Path, help="write a line for every bug")
    args = parser.parse_args()
    chosen = list(dict.fromkeys(bug for name in args.names or [""] for bug in BUGS if bug.name.startswith(name)))
    results = []
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory))
        for bug in chosen:
            started = time.perf_counter()
            said = life(bench, bug) if bug.event else forward(bench, bug, quick=args.quick)
            results.append((bug, said))
            seconds = time.perf_counter() - started
            where = f"in {bug.expected}; run names {said['run']}, bisect {said['bisect']}" if bug.expected else ""
            print(f"{seconds:6.1f} s  {bug.name:28} {bug.model:15} {said['verdict'][:60]:30} {where}", flush=True)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps({"name": bug.name, "expected": bug.expected, **said}) + "\n")
    visible = [said["is_caught"] for bug, said in results if not bug.equivalent]
    local = [(bug, said) for bug, said in results if bug.expected and not bug.equivalent]
    by_run = sum(bug.expected == said["run"] for bug, said in local)
    either = sum(bug.expected in (said["run"], said["bisect"]) for bug, said in local)
    run = sum(said.get("by_run", said["is_caught"]) for bug, said in results if not bug.equivalent)
    print(
        f"caught: {sum(visible)} of {len(visible)}, {run} of them by run or lifecycle, the rest by bisect --everywhere;"
        f" {len(results) - len(visible)} more cannot be seen"
    )
    print(f"place named: by run {by_run}, by run or bisect {either} of {len(local)} that are in one")


if __name__ == "__main__":
    main()
