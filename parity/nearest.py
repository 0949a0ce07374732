"""Which planted bug a failure looks like: its profile against those of every mutant, from the library beside this file.

``parity/mutant_profiles.json`` is made by ``tandem mutate --profiles``, on models of the zoo.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

LIBRARY = "mutant_profiles.json"
NAMED = 0.7  # as similar as this, and
AHEAD = 0.1  # so much more than the next, to be named without being asked: then 19 of 20 are right, else 2 of 3
WIDTH = 0.5  # root mean square distance of two profiles, in standard deviations, at which they are 0.6 alike


@dataclass(frozen=True, slots=True)
class Likeness:
    """A mutant that a failure looks like. ``says``: what its bug is. ``similarity``: 1 is the same profile, 0 none."""

    name: str
    says: str
    similarity: float


@dataclass(frozen=True)
class Library:
    """Profiles of mutants: [n, features], each feature divided by its standard deviation over all."""

    names: tuple[str, ...]
    says: Mapping[str, str]
    features: tuple[str, ...]
    profiles: np.ndarray
    scales: np.ndarray


@cache
def library() -> Library:
    """The profiles that are shipped."""
    from importlib.resources import files  # slow to import, and only failures need it

    return as_library(json.loads(files("parity").joinpath(LIBRARY).read_text(encoding="utf-8")))


def as_library(document: Mapping[str, Any]) -> Library:
    """A library from its document: ``features`` by name, and of every mutant what it ``says`` and its ``profiles``."""
    mutants: dict[str, Any] = document["mutants"]
    pairs = [(name, values) for name, entry in mutants.items() for values in entry["profiles"]]
    profiles = np.array([values for _, values in pairs], float)
    scales = np.maximum(profiles.std(axis=0), 0.05)  # of a feature that hardly varies, noise is not to be blown up
    says = {name: str(entry["says"]) for name, entry in mutants.items()}
    return Library(tuple(name for name, _ in pairs), says, tuple(document["features"]), profiles / scales, scales)


def nearest(profile: Mapping[str, float], among: Library | None = None) -> list[Likeness]:
    """Every mutant by falling similarity; of several profiles of one, its nearest."""
    among = library() if among is None else among
    own = np.array([profile.get(feature, 0.0) for feature in among.features]) / among.scales
    distances = np.sqrt(np.square(among.profiles - own).mean(axis=1))
    best: dict[str, float] = {}
    for name, distance in zip(among.names, distances, strict=True):
        best[name] = min(best.get(name, math.inf), float(distance))
    order = sorted(best, key=lambda name: best[name])
    return [Likeness(name, among.says[name], math.exp(-0.5 * (best[name] / WIDTH) ** 2)) for name in order]


def outstanding(found: list[Likeness]) -> Likeness | None:
    """The first, if it is alike enough, and distinctly more so than the next."""
    if not found or found[0].similarity < NAMED:
        return None
    return found[0] if len(found) == 1 or found[0].similarity - found[1].similarity >= AHEAD else None
