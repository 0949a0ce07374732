"""The museum: every upstream bug of live weights that was told in public, and the check here that catches it.

``python -m parity.museum > docs/museum.md`` writes the catalogue. A bug is shown as a mutant of our own models
(``tandem mutate``), as an exhibit, a little engine with that one bug (``parity.museum.parts``,
``parity.museum.loading``), or both.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from parity.museum.exhibits import BUGS, EXHIBITS, Bug, Exhibit

SHAPES = {
    "a": "storage is bound anew after a capture",
    "b": "what is derived is not refreshed",
    "c": "a source is deleted once something was derived from it",
    "d": "deriving is not idempotent: what was derived is derived again",
    "e": "a parameter is made anew and loses what a loader had hung on it",
    "f": "the contract of arguments or names between loader and model is broken",
    "g": "a borrowed tensor is kept beyond its step",
}
LAWS = {
    1: "one address",
    2: "exactly once",
    3: "ids by keyword",
    4: "sources and derived",
    5: "stable storage",
    6: "all or nothing",
    7: "coherent caches",
    8: "idempotent",
    9: "transparent wrappers",
    10: "aliases stay aliases",
}


@dataclass(frozen=True)
class Shown:
    """An exhibit ready to be taken through its life: the subject, and the two checkpoints it lives between."""

    subject: Any
    a: Any
    b: Any


def show(exhibit: Exhibit) -> Shown:
    """Build an exhibit. Imports torch."""
    engine = import_module("parity.museum.engine")
    made = getattr(import_module(f"parity.museum.{exhibit.module}"), exhibit.name)
    if issubclass(made, engine.Engine):
        is_tied = made.is_tied
        return Shown(engine.subject(made), *(engine.checkpoint(seed, is_tied=is_tied) for seed in range(2)))
    kind = next(name for name, part in engine.Engine.kinds.items() if issubclass(made, part))
    return Shown(engine.subject(**{kind: made}), *map(engine.checkpoint, range(2)))


def render() -> str:
    """The catalogue, as Markdown."""
    from parity.mutants import all_mutants

    detectors = {name: mutant.detector.__name__ for name, mutant in all_mutants().items()}
    shown = [bug for bug in BUGS if not bug.absent]
    lines = [
        "# The museum",
        "",
        "Bugs of live weights that other projects had and told about, the law each one breaks, and the check here that"
        " catches it. Written by `python -m parity.museum`; the tests run every exhibit with its bug and without, and"
        " `tandem mutate` runs the mutants.",
        "",
        f"{len(shown)} bugs are shown, {len(BUGS) - len(shown)} cannot be here.",
        "",
        "Laws: " + "; ".join(f"{number} {says}" for number, says in LAWS.items()) + ".",
        "",
        "Shapes: " + "; ".join(f"{letter} {says}" for letter, says in SHAPES.items()) + ".",
        "",
        "An exhibit is a small model with that one bug; the check is an event of `parity.foreign.lifecycle`. A mutant"
        " is the bug planted in our own models; the check is the detector that kills it.",
        "",
        "| bug | what happened | law | shape | exhibit | check |",
        "|---|---|---|---|---|---|",
        *(_row(bug, detectors) for bug in shown),
        "",
        "## Not shown",
        "",
        *(f"- {bug.where} {bug.numbers}: {bug.says}. {bug.absent}" for bug in BUGS if bug.absent),
    ]
    return "\n".join(lines) + "\n"


def _row(bug: Bug, detectors: dict[str, str]) -> str:
    exhibits = [EXHIBITS[name] for name in bug.exhibits]
    things = [f"`{exhibit.name}`" for exhibit in exhibits] + [f"mutant `{name}`" for name in bug.mutants]
    checks = [", ".join(exhibit.caught_by) for exhibit in exhibits] + [f"`{detectors[name]}`" for name in bug.mutants]
    seed = " (seed)" if bug.is_seed else ""
    laws = ", ".join(map(str, bug.laws))
    cells = [f"{bug.where} {bug.numbers}{seed}", bug.says, laws, bug.shape, "; ".join(things)]
    return f"| {' | '.join(cells)} | {'; '.join(dict.fromkeys(checks))} |"
