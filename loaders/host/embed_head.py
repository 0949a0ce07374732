"""Embedding and head as a swap is given them: which of the two this stage has, and what cannot be swapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loaders.spec import Specs

Halves = dict[str, tuple[str, Any]]  # half -> name of its parameter, and what it is to be


def asked_halves(
    specs: Specs,
    embed: Any,
    head: Any,
    *,
    live: Callable[[str], object],
    misfits: Callable[[str, str, Any], list[str]],
) -> tuple[Halves, tuple[str, ...]]:
    """Those that are asked for and fit, and those that this stage lacks; None is not asked for.

    Args:
        specs: of the stage.
        embed: what the embedding is to be.
        head: what the head is to be.
        live: the parameter of a name.
        misfits: why a half's value cannot be that of a parameter, by its name.
    Raises:
        ValueError: listing everything that does not fit.
    """
    given = {"embed": (specs.embedding, embed), "head": (specs.head, head)}
    ignored = tuple(half for half, (name, value) in given.items() if value is not None and name is None)
    asked = {half: (name, value) for half, (name, value) in given.items() if value is not None and name is not None}
    problems: list[str] = []
    for half, (name, value) in asked.items():
        if name.rpartition(".")[0] not in specs.schemes:
            problems += misfits(half, name, value)
        elif value is not live(name):
            codes = "its codes mean nothing without their scales"
            problems.append(f"{half} is quantised: {codes}. Reload a checkpoint instead")
    if problems:
        raise ValueError("; ".join(problems) + ". Nothing was changed.")
    return asked, ignored
