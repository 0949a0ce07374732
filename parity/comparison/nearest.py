"""Which known bug a failure resembles: its profile against those of every mutant, from the library beside this file.

``parity/comparison/mutant_profiles.json`` is made by ``tandem mutate --profiles``, on models of the zoo.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from parity.wording import joined

LIBRARY = "mutant_profiles.json"
FLOOR = 0.6  # less alike is no match: profiles left out of the library are recognised in 45 % of cases, in 63 % above
TIE = 0.05  # mutants so near each other cannot be told apart
# Parts of an architecture, as their weights are called: a bug in a part is none of a model that lacks it.
# The eleventh layer is one: without it no number of a layer sorts otherwise as text.
PARTS = (".layers.10", ".mlp.gate", ".shared_expert", ".linear_attn", ".pre_feedforward_layernorm", ".q_proj.bias")
SHOWN = 3  # the most alike, at most
NAMED = 0.7  # as similar as this, and
AHEAD = 0.1  # so much more than the next, to be named without being asked: then 19 of 20 are right, else 2 of 3
WIDTH = 0.5  # root mean square distance of two profiles, in standard deviations, at which they are 0.6 alike


@dataclass(frozen=True, slots=True)
class Likeness:
    """A mutant that a failure resembles.

    Attributes:
        says: what its bug is.
        similarity: of the two patterns of errors over layers, tokens and channels: 1 is the same one, 0 none in common.
    """

    name: str
    says: str
    similarity: float


@dataclass(frozen=True)
class Library:
    """Profiles of mutants: [n, features], each feature divided by its standard deviation over all.

    ``parts``: what of ``PARTS`` a model needs to have, by mutant.
    """

    names: tuple[str, ...]
    says: Mapping[str, str]
    parts: Mapping[str, frozenset[str]]
    features: tuple[str, ...]
    profiles: np.ndarray
    scales: np.ndarray


@cache
def library() -> Library:
    """The profiles that are shipped."""
    from importlib.resources import files  # slow to import, and only failures need it

    return as_library(json.loads(files("parity.comparison").joinpath(LIBRARY).read_text(encoding="utf-8")))


def as_library(document: Mapping[str, Any]) -> Library:
    """A library from its document: ``features`` by name, and of every mutant ``says``, ``parts`` and ``profiles``."""
    mutants: dict[str, Any] = document["mutants"]
    pairs = [(name, values) for name, entry in mutants.items() for values in entry["profiles"]]
    profiles = np.array([values for _, values in pairs], float)
    scales = np.maximum(profiles.std(axis=0), 0.05)  # of a feature that hardly varies, noise is not to be blown up
    says = {name: str(entry["says"]) for name, entry in mutants.items()}
    parts = {name: frozenset(entry.get("parts", ())) for name, entry in mutants.items()}
    names, features = tuple(name for name, _ in pairs), tuple(document["features"])
    return Library(names, says, parts, features, profiles / scales, scales)


def parts_of(modules: Iterable[str]) -> frozenset[str]:
    """Which of ``PARTS`` a model has, from the names of its weights or modules."""
    names = [f"{name}." for name in modules]
    return frozenset(part for part in PARTS if any(f"{part}." in name for name in names))


def nearest(
    profile: Mapping[str, float], among: Library | None = None, *, parts: Collection[str] | None = None
) -> list[Likeness]:
    """Every mutant by falling similarity; of several profiles of one, its nearest.

    ``parts``: of the model that failed: mutants of others are left out. None: they are unknown, so none is left out.
    """
    among = library() if among is None else among
    own = np.array([profile.get(feature, 0.0) for feature in among.features]) / among.scales
    distances = np.sqrt(np.square(among.profiles - own).mean(axis=1))
    best: dict[str, float] = {}
    for name, distance in zip(among.names, distances, strict=True):
        best[name] = min(best.get(name, math.inf), float(distance))
    possible = [name for name in best if parts is None or among.parts[name] <= set(parts)]
    order = sorted(possible, key=lambda name: best[name])
    return [Likeness(name, among.says[name], math.exp(-0.5 * (best[name] / WIDTH) ** 2)) for name in order]


def outstanding(found: list[Likeness]) -> Likeness | None:
    """The first, if it is alike enough, and distinctly more so than the next."""
    if not found or found[0].similarity < NAMED:
        return None
    return found[0] if len(found) == 1 or found[0].similarity - found[1].similarity >= AHEAD else None


def resemblance(profile: Mapping[str, float], parts: Collection[str] | None = None) -> str:
    """Which known bug a failure resembles, in half a sentence a reader who has seen no such number understands.

    ``parts`` as for ``nearest``.
    """
    found = nearest(profile, parts=parts)
    alike = [one for one in found[:SHOWN] if one.similarity >= FLOOR]
    return told_alike(alike, len(found))


def told_alike(alike: Sequence[Likeness], known: int) -> str:
    """The same of what is alike enough, by falling similarity, of so many known bugs."""
    if not alike:
        return f"resembles none of the {known} known bug patterns"
    ties = [one for one in alike if alike[0].similarity - one.similarity <= TIE]
    told = [f"{one.name} ({one.says})" for one in {one.says: one for one in reversed(ties)}.values()][::-1]
    which = "the known bug pattern" if len(told) == 1 else "known bug patterns too alike to tell apart:"
    return f"most resembles {which} {joined(told, 'or')}: a {alike[0].similarity:.0%} match (100%: the same)"
