"""Regular expressions that files bring: held to what ends in time."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

FEW = 16  # so many of anything are tried soon
MANY = 64  # an endless repetition of letters counts as so many ways: about the letters of a name
MOST_WAYS = MANY**4  # are tried in a fraction of a second
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
        ways = _ways(parsed, is_last=True)
    except (re.error, RecursionError, OverflowError) as error:
        return f"it is no regular expression: {error}"
    if is_endless:
        return "it repeats without end what itself repeats, or is a choice, and might never be done"
    if ways > MOST_WAYS:
        return f"it has too many repetitions or choices one after the other: a name may be tried in {ways:.0e} ways"
    return None


def _ways(parts: Sequence[Any], *, is_last: bool) -> float:
    """In how many ways a name may be tried, at most, before it is known not to match; those of ``parts`` multiply.

    ``is_last``: nothing follows that could fail. Of a repetition in the end only its longest is then tried.
    """
    ways = 1.0
    for index, (operation, argument) in enumerate(parts):
        following = list(parts)[index + 1 :]
        is_end = is_last and not following
        match str(operation):
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, most, repeated = argument
                inner = _ways(repeated, is_last=False)
                if most > FEW:
                    found = 1 if is_end or _is_ended(repeated, following) else MANY
                else:
                    counts = 1 if is_end or _is_ended(repeated, following) else most - least + 1
                    found = counts * inner**most if inner <= MOST_WAYS else inner
            case "BRANCH":
                found = sum(_ways(one, is_last=is_end) for one in argument[1])
            case _:
                inner = [one for one in _flat(argument) if isinstance(one, type(parts))]
                found = math.prod(_ways(one, is_last=is_end) for one in inner)
        ways *= max(found, 1)
    return ways


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
