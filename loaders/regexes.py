"""Regular expressions that files bring: held to what ends in time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

FEW = 16  # so many of anything are tried soon
MANY = 64  # an endless repetition of letters counts as so many ways: about the letters of a name
MOST_STEPS = 8 * MANY**4  # of the longest names; few take a hundredth of them
# a module of re's own that has no public name: what else knows a pattern's parts?
_PARSER: Any = re._parser  # pyright: ignore[reportAttributeAccessIssue]
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT")
_CLASSES = {"CATEGORY_WORD": r"\w", "CATEGORY_DIGIT": r"\d", "CATEGORY_SPACE": r"\s"}
_CLASSES |= {name.replace("_", "_NOT_", 1): text.upper() for name, text in _CLASSES.items()}


def regex_problem(pattern: str) -> str | None:
    """Why a regular expression is none, or none that may be tried on names: some take longer than anybody lives.

    A repetition without end of what varies in length, or is a choice, can be tried in more ways than there are letters,
    each of them in turn; not so where a letter ends every round, as in ``([^.]+[.])*``. None: it is fine.
    """
    try:
        re.compile(pattern)
        parsed = _PARSER.parse(pattern)
        is_endless = _may_take_for_ever(parsed, is_repeated=False)
        cost = _cost(parsed, is_last=True)
    except (re.error, RecursionError, OverflowError) as error:
        return f"it is no regular expression: {error}"
    if is_endless:
        return "it repeats without end what itself repeats, or is a choice, and might never be done"
    if cost.steps > MOST_STEPS:
        return f"it has too many repetitions or choices one after the other: a name may take {cost.steps:.0e} steps"
    return None


class _Cost(NamedTuple):
    """At most, of a name that does not match: in how many ways a part is passed, and what trying all of them takes."""

    ways: float
    steps: float


def _cost(parts: Iterable[Any], *, is_last: bool) -> _Cost:
    """Of parts one after the other: each is tried for every way through those before it.

    ``is_last``: nothing follows that could fail. Of a repetition in the end only its longest is then tried.
    """
    ways, steps = 1.0, 0.0
    for part, following in _with_next(parts):
        found = _cost_of_one(part, following, is_end=is_last and following is None)
        steps += ways * found.steps
        ways *= found.ways
    return _Cost(ways, steps)


def _cost_of_one(part: Any, following: Any, *, is_end: bool) -> _Cost:
    operation, argument = str(part[0]), part[1]
    if operation in _REPEATS:
        least, most, repeated = argument
        inner = _cost(repeated, is_last=False)
        if is_end and least == 0:
            return _Cost(1, 1)  # whoever comes here has matched
        counts = 1 if is_end or _is_ended(repeated, following) else min(most, MANY) - least + 1
        if most > FEW or inner.ways == 1:  # endless ones repeat what has one way
            return _Cost(max(counts, 1), min(most, MANY) * inner.steps)
        ways = inner.ways if inner.ways <= MOST_STEPS else MOST_STEPS
        rounds = ways**most
        return _Cost(counts * rounds, (rounds - 1) / (ways - 1) * inner.steps)
    if operation == "BRANCH":
        inner = [_cost(one, is_last=is_end) for one in argument[1]]
        ways = _ways_of_words(argument[1]) or sum(one.ways for one in inner)
        return _Cost(ways, sum(one.steps for one in inner))
    inner = [_cost(one, is_last=is_end) for one in _sequences(argument)]
    ways = math.prod(one.ways for one in inner)
    is_passed_once = operation.startswith(("ASSERT", "ATOMIC", "POSSESSIVE"))
    return _Cost(1 if is_passed_once else ways, 1 + sum(one.steps for one in inner))


def _ways_of_words(choices: Iterable[Iterable[Any]]) -> int | None:
    """How many of several words may stand at one place: those that another begins with. None: they are no words."""
    words = []
    for choice in choices:
        letters = list(choice)
        if any(str(operation) != "LITERAL" for operation, _ in letters):
            return None
        words.append("".join(chr(letter) for _, letter in letters))
    most, open_words = 1, []
    for word in sorted(words):  # whatever a word begins with stands before it
        while open_words and not word.startswith(open_words[-1]):
            open_words.pop()
        open_words.append(word)
        most = max(most, len(open_words))
    return most


def _may_take_for_ever(parts: Iterable[Any], *, is_repeated: bool) -> bool:
    """``parts``: of a parsed expression. ``is_repeated``: within a repetition without end."""
    for (operation, argument), following in _with_next(parts):
        is_repeat = str(operation) in _REPEATS
        is_endless = is_repeat and argument[1] > FEW
        if is_repeated and str(operation) == "BRANCH":
            return True
        if is_repeated and is_repeat and argument[0] != argument[1] and not _is_ended(argument[2], following):
            return True
        if any(_may_take_for_ever(one, is_repeated=is_repeated or is_endless) for one in _sequences(argument)):
            return True
    return False


def _is_ended(repeated: Sequence[Any], following: Any) -> bool:
    """Whether one kind of letter repeats, and a letter that is not of that kind comes next."""
    if len(repeated) != 1 or following is None or str(following[0]) != "LITERAL":
        return False
    operation, argument = repeated[0]
    letter = following[1]
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


def _with_next(parts: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Each, and the one that follows; None: none does."""
    found = list(parts)
    return zip(found, [*found[1:], None], strict=False)  # of none there are none


def _sequences(argument: Any) -> list[Any]:
    """Those that an operation is about, of parts one after the other."""
    if isinstance(argument, tuple | list):
        return [found for one in argument for found in _sequences(one)]
    return [argument] if isinstance(argument, _PARSER.SubPattern) else []
