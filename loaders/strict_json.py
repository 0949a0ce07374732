"""JSON as checkpoints must write it: an object, UTF-8, no key twice."""

from __future__ import annotations

import json
from typing import Any


class BadJson(ValueError):
    """Why a document is refused, as the end of a sentence that starts with the document's name."""


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse one JSON object.

    Raises:
        BadJson: not UTF-8, not JSON, not an object, nested too deep, or a repeated key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise BadJson(f"names {key!r} more than once; which one is meant cannot be known")
            found[key] = value
        return found

    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadJson(f"is not valid JSON ({error}). The file is damaged.") from None
    if not isinstance(document, dict):
        raise BadJson(f"holds a JSON {type(document).__name__}, expected an object")
    return document
