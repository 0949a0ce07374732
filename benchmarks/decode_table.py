"""The README's table of decoding: made of the figures that ``bench_decode --readme`` keeps, so that a test can tell."""

import re
import statistics
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parent / "results" / "decode.json"
README = Path(__file__).parents[1] / "README.md"
MARKERS = ("<!-- decode -->", "<!-- /decode -->")
SECTION = re.compile(f"{MARKERS[0]}\n.*?{MARKERS[1]}", re.DOTALL)
PEER = {"jax": "tunix", "torch": "transformers"}

Seconds = dict[str, list[float]]  # of a step of each, one for every round


def summed_up(seconds: Seconds) -> dict[str, dict[str, float]]:
    """Medians: ``ms`` of a step of each, and ``speed`` of ours over its peer's, where both were measured."""
    # ratios round by round: neighbours on the machine slow both sides of a round alike
    ratios = {
        name: [theirs / ours for ours, theirs in zip(seconds[name], seconds[peer], strict=True)]
        for name, peer in PEER.items()
        if {name, peer} <= seconds.keys()
    }
    return {
        "ms": {name: round(1e3 * statistics.median(each), 1) for name, each in seconds.items()},
        "speed": {name: round(statistics.median(each), 2) for name, each in ratios.items()},
    }


def table(cases: dict[str, dict[str, dict[str, float]]]) -> str:
    """A row for every case, of what ``summed_up`` makes of it."""
    names = list(next(iter(cases.values()))["ms"])
    heads = ["float32, ms a step", *names, *(f"{ours} over {peer}" for ours, peer in PEER.items())]
    rows = [heads, ["---"] * len(heads)]
    for case, found in cases.items():
        speeds = [f"{found['speed'][name]:.2f}x" if name in found["speed"] else "not measured" for name in PEER]
        rows.append([case, *(f"{found['ms'][name]:.0f}" for name in names), *speeds])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace("| --- ", "|---").replace("|--- |", "|---|")


def section(figures: dict[str, Any]) -> str:
    """What stands between the README's markers, and they."""
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    last = (
        f"{figures['date']}, {figures['threads']} threads, medians of {figures['rounds']} rounds in turns; {versions}."
    )
    return "\n".join([MARKERS[0], table(figures["cases"]), "", last, MARKERS[1]])
