"""Shape suffixes, checked: ``x_BTD`` has three axes, and ``B`` is one size within a function.

The letters are those of docs/glossary.md; a digit is its own size. Every local that ends in them is looked at when its
function returns, in both frameworks and also while ``jax.jit`` traces (a cached trace runs no Python, so nothing is
seen then). There is nothing to annotate.
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
LETTERS = frozenset(re.findall(r"^\| `([A-Z])` \|", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE))
DIGITS = frozenset("123456789")


def suffix_of(name: str) -> str | None:
    """``BT1`` of ``x_BT1``; None for names that end otherwise, and for CONSTANTS."""
    stem, _, suffix = name.rpartition("_")
    is_suffix = stem and not name.isupper() and LETTERS & set(suffix) and (LETTERS | DIGITS).issuperset(suffix)
    return suffix if is_suffix else None


def lies(variables: Mapping[str, Any]) -> list[str]:
    """What the suffixes of one function's arrays say that is not so."""
    found = []
    sizes = {digit: (int(digit), "its name") for digit in DIGITS}
    for name, value in variables.items():
        suffix, shape = suffix_of(name), getattr(value, "shape", None)
        if suffix is None or not isinstance(shape, tuple):
            continue
        if len(suffix) != len(shape):
            found.append(f"{name} has shape {tuple(shape)}, expected {len(suffix)} axes")
            continue
        for letter, size in zip(suffix, shape, strict=True):
            known, where = sizes.setdefault(letter, (size, name))
            if size != known:
                found.append(f"{name} has shape {tuple(shape)}, expected {letter}={known} as in {where}")
    return found


@contextmanager
def checked_shape_suffixes(*packages: str) -> Iterator[set[str]]:
    """Fail at the end of the block if a function of ``packages`` returned with a local that lies.

    Gives the names of the functions looked at, to be read after the block.
    """
    prefixes = tuple(f"{package}." for package in packages)
    found: dict[str, None] = {}  # in order, each once
    seen: set[str] = set()

    def look(frame: FrameType, event: str, _: object) -> None:
        module = frame.f_globals.get("__name__")
        if event == "return" and f"{module}.".startswith(prefixes):
            where = f"{module}.{frame.f_code.co_qualname}"
            seen.add(where)
            found.update(dict.fromkeys(f"{where}: {lie}" for lie in lies(frame.f_locals)))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield seen
    finally:
        sys.setprofile(before)
    assert not found, "\n".join(found)
