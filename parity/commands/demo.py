"""``tandem demo``: the main job on an embedded default, in a minute or two. Nothing is downloaded."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parity.commands.options import output_file
from parity.whole_file import write_report

if TYPE_CHECKING:
    from parity.comparison.outcome import Comparison
    from parity.events import EventResult

REPORT = Path("demo-report/index.html")
NVFP4 = "qwen3 nvfp4"
MODELS = {"qwen3-moe": "Qwen3-MoE", "qwen3": "Qwen3 dense", "qwen3_5": "Qwen3.5", NVFP4: "Qwen3 NVFP4"}
# compiling takes most of the time, and grows with the layers
FEW_LAYERS: dict[str, dict[str, Any]] = {
    "qwen3-moe": {"num_hidden_layers": 3},
    "qwen3": {"num_hidden_layers": 3},
    "qwen3_5": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    NVFP4: {"num_hidden_layers": 2},
}
FILE_BYTES = 50_000  # small enough that each checkpoint has several files and an index


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", type=output_file, help=f"report; default: {REPORT}, made new")


def run(args: argparse.Namespace) -> int:
    from parity.events import render_text
    from parity.report.page import render_html
    from parity.report.results import overall

    output = args.output or REPORT
    if args.output is None:
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise ValueError(f"{output} is a directory, expected a file. Remove it, or give -o.")
    start = time.perf_counter()
    comparisons: list[tuple[str, Comparison]] = []
    events: list[EventResult] = []
    with tempfile.TemporaryDirectory(prefix="tandem-demo-") as scratch:
        for name, title in MODELS.items():
            print(f"{title}: two checkpoints, written, loaded, run, swapped, reloaded and broken ...", flush=True)
            found = _one_model(name, title, Path(scratch) / name)
            comparisons += found[0]
            events += found[1]
    print(render_text(events))
    for what, comparison in comparisons:
        print(f"{what}\n  {comparison.verdict}: {comparison.summary}\n")
    seconds = time.perf_counter() - start
    facts = {"models": ", ".join(MODELS.values()), "events": str(len(events)), "seconds": f"{seconds:.0f}"}
    page = render_html(
        "One checkpoint, two backends, live weights", comparisons=comparisons, events=events, facts=facts
    )
    write_report(output, page)
    verdict = overall(comparisons, events)
    print(f"{verdict} in {seconds:.0f} s. Report: {output}")
    return 0 if verdict == "PASS" else 1


def _one_model(name: str, title: str, scratch: Path) -> tuple[list[tuple[str, Comparison]], list[EventResult]]:
    """Both checkpoints of one zoo model through every event, and both backends compared after a reload."""
    import dataclasses

    from loaders import open_checkpoint
    from parity.backends import open_backend
    from parity.compare import compare
    from parity.lifecycle.run import run_lifecycle
    from parity.record import default_inputs, record
    from parity.record_oracle import record_oracle
    from parity.zoo import ZooQuantization, block_sizes, make_checkpoint

    zoo = name.partition(" ")[0]
    options: dict[str, Any] = FEW_LAYERS[name]
    if name == NVFP4:  # weights only, every matrix with a global scale of its own
        options = options | block_sizes(zoo) | {"quantization": ZooQuantization(activations=False, unify=False)}
    a, b = (make_checkpoint(zoo, scratch / seed, seed=ord(seed), max_file_bytes=FILE_BYTES, **options) for seed in "AB")
    (scratch / "events").mkdir()
    backends = {backend: open_backend(backend) for backend in ("jax", "torch")}
    events = [
        dataclasses.replace(event, backend=f"{title} {event.backend}")
        for event in run_lifecycle(a, b, backends=tuple(backends), scratch=scratch / "events")
    ]
    comparisons = []
    mtp = open_checkpoint(a).config.num_mtp_layers > 0
    for what, dtype, reload in (("as loaded", "float32", None), ("after a hot reload", "bfloat16", b)):
        tokens = (
            8 if dtype == "float32" else None
        )  # low-precision rows part at the first near-tie, which proves nothing
        traces = {
            side: record(a, backend, dtype=dtype, reload=reload, max_new_tokens=tokens, mtp=mtp)
            for side, backend in backends.items()
        }
        checkpoint = open_checkpoint(reload or a)
        inputs = default_inputs(checkpoint)
        oracles = {
            side: record_oracle(checkpoint, inputs, like=trace, mtp=mtp, probes=None if side == "jax" else 0)
            for side, trace in traces.items()
        }
        found = compare(traces["jax"], traces["torch"], oracles["jax"], oracle_b=oracles["torch"])
        comparisons.append((f"{title} {what}, {dtype}: JAX, torch and the float64 oracle", found))
    return comparisons, events
