"""What happened to a model's weights, in order. Kept by both backends, written into traces and reports."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """One published change, or a call that changed nothing but must be reported (its version is the one before).

    Attributes:
        kind: ``load``, ``swap``, ``reload``, ...
        version: the version it published.
        detail: what it was made from, for people.
        ignored: what was given but does not live here (a half this stage lacks), named, never silent.
        content: what it was made from, wherever that lies, in few words, by which processes of a mesh tell their models
            apart; of a load, a reload, a swap and ``replace`` only where there are several.
    """

    kind: str
    version: int
    detail: str = ""
    ignored: tuple[str, ...] = ()
    content: str = ""


def version_of(events: Sequence[Event]) -> str:
    """Which weights a model serves, in few words: equal on processes that made the same of it."""
    made = "\n".join(f"{event.kind} {event.version} {event.content}" for event in events)
    return f"version {events[-1].version} ({hashlib.sha256(made.encode()).hexdigest()[:8]})"
