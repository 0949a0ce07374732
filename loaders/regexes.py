"""Regular expressions that files bring: held to what ends in time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

FEW = 16  # so many of anything are tried soon
_CLASSES = {"CATEGORY_WORD": r"\w", "CATEGORY_DIGIT": r"\d", "CATEGORY_SPACE": r"\s"}
_CLASSES |= {name.replace("_", "_NOT_", 1): text.upper() for name, text in _CLASSES.items()}


def regex_problem(pattern: str) -> str | None:
    """Why a regular expression is none, or none that may be tried on names: some take longer than anybody lives.

    A repetition without end of what repeats itself, or is a choice, can be tried in more ways than there are letters,
    each of them in turn; not so where a letter ends every round, as in ``([^.]+[.])*``. None: it is fine.
    """
    try:
        re.compile(pattern)
        # a module of re's own that has no public name: what else knows a pattern's parts?
        parsed = re._parser.parse(pattern)  # pyright: ignore[reportAttributeAccessIssue]
        is_endless = _may_take_for_ever(parsed, is_repeated=False)
    except (re.error, RecursionError, OverflowError) as error:
        return f"it is no regular expression: {error}"
    return "it repeats without end what itself repeats, or is a choice, and might never be done" if is_endless else None


def _may_take_for_ever(parts: Sequence[Any], *, is_repeated: bool) -> bool:
    """``parts``: of a parsed expression. ``is_repeated``: within a repetition without end."""
    for index, (operation, argument) in enumerate(parts):
        is_endless = str(operation) in ("MAX_REPEAT", "MIN_REPEAT") and argument[1] > FEW
        if is_repeated and str(operation) == "BRANCH":
            return True
        if is_repeated and is_endless and not _is_ended(argument[2], list(parts)[index + 1 :]):
            return True
        inner = [one for one in _flat(argument) if isinstance(one, type(parts))]
        if any(_may_take_for_ever(one, is_repeated=is_repeated or is_endless) for one in inner):
            return True
    return False


def _is_ended(repeated: Sequence[Any], following: list[Any]) -> bool:
    """Whether one kind of letter repeats, and a letter that is not of that kind comes next."""
    if len(repeated) != 1 or not following or str(following[0][0]) != "LITERAL":
        return False
    operation, argument = repeated[0]
    letter = following[0][1]
    if str(operation) == "IN":
        items = [(str(kind), value) for kind, value in argument]
        is_negated = items[0][0] == "NEGATE"
        return any(_is_of(kind, value, letter) for kind, value in items) == is_negated
    return str(operation) in ("LITERAL", "NOT_LITERAL") and not _is_of(str(operation), argument, letter)


def _is_of(kind: str, value: Any, letter: int) -> bool:
    if kind == "RANGE":
        return value[0] <= letter <= value[1]
    if kind == "CATEGORY":
        return re.match(_CLASSES[str(value)], chr(letter)) is not None
    return {"LITERAL": value == letter, "NOT_LITERAL": value != letter}.get(kind, False)


def _flat(argument: Any) -> list[Any]:
    if isinstance(argument, tuple | list):
        return [found for one in argument for found in _flat(one)]
    return [argument]
