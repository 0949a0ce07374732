"""Shape suffixes, checked: ``x_BTD`` has three axes, and ``B`` is one size within a function. Letters: docs/glossary.md.

Every local of a function that ends in glossary letters is looked at when the function returns, in both frameworks and
also while ``jax.jit`` traces (a cached trace runs no Python, so nothing is seen then). There is nothing to annotate.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

GLOSSARY = Path(__file__).parents[1] / "docs" / "glossary.md"
LETTERS = frozenset(re.findall(r"^\| `([A-Z1])` \|", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE))


def suffix_of(name: str) -> str | None:
    """``BTD`` of ``x_BTD``; None for names without letters of the glossary, and for CONSTANTS."""
    stem, _, suffix = name.rpartition("_")
    return suffix if stem and suffix and LETTERS.issuperset(suffix) and not name.isupper() else None


def lies(variables: Mapping[str, Any]) -> list[str]:
    """What the suffixes of one function's arrays say that is not so."""
    found = []
    sizes = {"1": (1, "'1'")}
    for name, value in variables.items():
        suffix, shape = suffix_of(name), getattr(value, "shape", None)
        if suffix is None or not isinstance(shape, tuple):
            continue
        if len(suffix) != len(shape):
            found.append(f"{name} has shape {tuple(shape)}, expected {len(suffix)} axes")
            continue
        for letter, size in zip(suffix, shape, strict=True):
            known, other = sizes.setdefault(letter, (size, name))
            if size != known:
                found.append(f"{name} has shape {tuple(shape)}, expected {letter}={known} as in {other}")
    return found


@contextmanager
def checked_shape_suffixes(*packages: str) -> Iterator[None]:
    """Fail at the end of the block if a function of ``packages`` returned with a local that lies."""
    found: dict[str, None] = {}  # in order, each once

    def look(frame: FrameType, event: str, _: object) -> None:
        module = str(frame.f_globals.get("__name__"))
        if (
            event == "return"
            and module.startswith(packages)
            and any(f"{module}.".startswith(f"{p}.") for p in packages)
        ):
            where = f"{module}.{frame.f_code.co_qualname}"
            found.update(dict.fromkeys(f"{where}: {lie}" for lie in lies(frame.f_locals)))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)
    assert not found, "\n".join(found)
