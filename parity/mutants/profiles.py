"""Makes the library of ``parity.comparison.nearest``: what is seen of every mutant that changes a forward pass.

In torch, in float32, against a clean run and the oracle under the mutant's own expert choices, on models of two depths.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loaders import open_checkpoint
from parity.comparison.nearest import parts_of
from parity.mutants import Mutant, all_mutants
from parity.mutants.bench import Subject, as_trace, forward, load, record
from parity.oracle import oracle_forward
from parity.trace import Trace
from parity.zoo import make_checkpoint, prompts

SETTINGS = ((0, 2), (1, 4), (2, 3))  # seed of the weights and of the prompts, decoder layers


class Profiler:
    """Checkpoints, clean runs and oracles, made once each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kept: dict[tuple[Subject, int], tuple[Path, dict[str, np.ndarray], Trace]] = {}

    def clean(self, subject: Subject, seed: int) -> tuple[Path, dict[str, np.ndarray], Trace]:
        """The checkpoint of a subject and a seed, a batch for it, and what torch makes of it."""
        if (subject, seed) not in self.kept:
            path = self.directory / str(len(self.kept))
            make_checkpoint(subject.model, path, seed=seed, dtype=subject.dtype, **dict(subject.changes))
            config = open_checkpoint(path).config
            sides = [prompts(config, rows=2, padding=side, seed=seed) for side in ("right", "left")]
            batch = {name: np.concatenate([side[name] for side in sides]) for name in sides[0]}
            self.kept[subject, seed] = path, batch, record("torch", load("torch", path), batch)
        return self.kept[subject, seed]

    def profile(self, mutant: Mutant, seed: int, layers: int) -> dict[str, float] | None:
        """What a comparison sees of one mutant; None when nothing fails."""
        # imported here: binding ``parity.compare`` to the module of that name would shadow the public function
        from parity.compare import compare

        path, batch, peer = self.clean(deepened(mutant.subject, layers), seed)
        with mutant.planted("torch"):
            mine = record("torch", load("torch", path), batch)
        oracles = []
        for trace in (mine, peer):
            routing = {name: x for name, x in trace.tensors.items() if name.startswith("routing.")}
            given: dict[str, Any] = batch
            found = oracle_forward(open_checkpoint(path), **given, routing=routing or None)
            oracles.append(as_trace("oracle64", batch, found))
        return compare(mine, peer, oracles[0], oracle_b=oracles[1]).profile


def deepened(subject: Subject, layers: int) -> Subject:
    """The subject with so many layers, its kinds of layers repeated; one that is deep already stays as it is."""
    changes = dict(subject.changes)
    if changes.get("num_hidden_layers") != 2:
        return subject
    changes["num_hidden_layers"] = layers
    if "layer_types" in changes:
        changes["layer_types"] = (changes["layer_types"] * layers)[:layers]
    return replace(subject, changes=tuple(changes.items()))


def profiled() -> list[Mutant]:
    """The mutants that a library holds: those that a forward pass in torch shows."""
    known = all_mutants().values()
    return [m for m in known if m.detector is forward and "torch" in m.backends and not m.equivalent and not m.refusal]


def make_library(mutants: Iterable[Mutant], settings: Sequence[tuple[int, int]] = SETTINGS) -> dict[str, Any]:
    """Profiles of ``mutants`` in every setting, as ``parity.comparison.nearest.as_library`` takes them."""
    found: dict[str, tuple[str, list[dict[str, float]]]] = {}
    parts: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as directory:
        profiler = Profiler(Path(directory))
        for mutant in mutants:
            profiles = [profiler.profile(mutant, seed, layers) for seed, layers in settings]
            if kept := [one for one in profiles if one]:
                found[mutant.name] = mutant.says, kept
                path, _, _ = profiler.clean(deepened(mutant.subject, settings[0][1]), settings[0][0])
                parts[mutant.name] = sorted(parts_of(open_checkpoint(path).tensors))
    return as_document(found, parts)


def as_document(
    found: Mapping[str, tuple[str, list[dict[str, float]]]], parts: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Profiles by mutant, with the features' names said once, and the parts that its model has."""
    features = sorted({feature for _, profiles in found.values() for one in profiles for feature in one})
    mutants = {
        name: {
            "says": says,
            "parts": list(parts[name]),
            "profiles": [[round(one.get(feature, 0.0), 2) for feature in features] for one in profiles],
        }
        for name, (says, profiles) in sorted(found.items())
    }
    return {"features": features, "mutants": mutants}


def write_library(path: Path, document: Mapping[str, Any]) -> None:
    """Write a library, one line a mutant."""
    lines = (f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in document["mutants"].items())
    body = ",\n".join(lines)
    path.write_text(
        f'{{"features": {json.dumps(document["features"])},\n"mutants": {{\n{body}\n}}}}\n', encoding="utf-8"
    )
