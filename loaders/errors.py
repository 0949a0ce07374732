"""The one exception a bad checkpoint raises, and the list it is collected in."""

from __future__ import annotations

from collections.abc import Sequence


class CheckpointError(ValueError):
    """A checkpoint, adapter or update that cannot be used as it is.

    ``problems`` holds every problem found, one sentence each, so that a user mends a checkpoint once and not ten times.
    """

    def __init__(self, where: object, problems: Sequence[str]) -> None:
        self.where = str(where)
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        lines = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(self.problems, 1))
        super().__init__(f"{self.where}: {count}{lines}")

    def __reduce__(self) -> tuple[type[CheckpointError], tuple[str, tuple[str, ...]]]:
        return type(self), (self.where, self.problems)
