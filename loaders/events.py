"""What happened to a model's weights, in order. Kept by both backends, written into traces and reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """One published change, or a call that changed nothing but must be reported (its version is the one before).

    Attributes:
        kind: ``load``, ``swap``, ``reload``, ...
        version: the version it published.
        detail: what it was made from, for people.
        ignored: what was given but does not live here (a half this stage lacks), named, never silent.
    """

    kind: str
    version: int
    detail: str = ""
    ignored: tuple[str, ...] = ()
