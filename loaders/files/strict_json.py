"""JSON as checkpoints must write it: an object, UTF-8, no key twice, numbers that other readers see as we do."""

from __future__ import annotations

import json
import math
from typing import Any

from loaders.errors import brief

_MAX_DIGITS = 20  # what a 64-bit integer needs, its sign included
_MAX_DEPTH = 32  # far below where comparing or printing a document would exhaust the stack


class BadJson(ValueError):
    """Why a document is refused, as the end of a sentence that starts with the document's name."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        BadJson: not UTF-8, not JSON (NaN and Infinity are not), not an object, nested too deep, a repeated key, or a
            number beyond 64 bits.
    """
    try:
        document = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadJson(f"is not valid JSON ({error}). The file is damaged.") from None
    if not isinstance(document, dict):
        raise BadJson(f"holds a JSON {type(document).__name__}, expected an object")
    if _is_deeper(document, _MAX_DEPTH):
        raise BadJson(f"is nested more than {_MAX_DEPTH} levels deep")
    return document


def _is_deeper(document: dict[str, Any], levels: int) -> bool:
    level: list[Any] = [document]
    for _ in range(levels):
        children = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        level = [child for child in children if isinstance(child, dict | list)]
    return bool(level)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise BadJson(f"names {brief(twice)} more than once; which one is meant cannot be known")
    return found


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise BadJson(f"holds an integer of {len(text)} digits, more than 64 bits can hold")
    return int(text)


def _finite(text: str) -> float:
    found = float(text)
    if not math.isfinite(found):
        raise BadJson(f"holds the number {text[:40]}, more than a float can hold")
    return found


def _no_constant(text: str) -> float:
    raise BadJson(f"holds {text}, which is not JSON")
