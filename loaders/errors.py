"""The one exception a bad checkpoint raises, and the list it is collected in."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80
_BRIEF.maxlist = 8
_MOST_LETTERS = 2000  # of one problem
_MOST_LISTED = 200


def brief(found: object) -> str:
    """``repr`` of what a file holds, cut in length and depth, so that no file can flood its own error."""
    return _BRIEF.repr(found)


def reason(error: OSError) -> str:
    """Why a system call failed, in the system's words, without the number and the path that messages say themselves."""
    return error.strerror or str(error)


def _one_line(problem: str) -> str:
    """Escape what could forge lines of a log or not be printed, and cut what floods it: names are anybody's text."""
    if not problem.isprintable():
        problem = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in problem)
    if len(problem) <= _MOST_LETTERS:
        return problem
    half = _MOST_LETTERS // 2
    return f"{problem[:half]} [{len(problem) - 2 * half} letters left out] {problem[-half:]}"


class CheckpointError(ValueError):
    """A checkpoint, adapter or update that cannot be used as it is.

    ``problems`` holds every problem found, one sentence each, so that a user mends a checkpoint once and not ten times;
    of very many the message has the first.
    """

    def __init__(self, where: object, problems: Sequence[str]) -> None:
        self.where = str(where)
        self.problems = tuple(_one_line(problem) for problem in problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        lines = "".join(f"\n  {number}. {one}" for number, one in enumerate(self.problems[:_MOST_LISTED], 1))
        if (more := len(self.problems) - _MOST_LISTED) > 0:
            lines += f"\n  and {more} more, which the exception's problems have"
        super().__init__(f"{_one_line(self.where)}: {count}{lines}")

    def __reduce__(self) -> tuple[type[CheckpointError], tuple[str, tuple[str, ...]]]:
        return type(self), (self.where, self.problems)
