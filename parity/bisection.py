"""What a bisection found, in words, tables and JSON."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parity.wording import number, share, told_share

WIDTH = 110
REST = "the rest of it"  # what a module does with the results of its parts


@dataclass(frozen=True, slots=True)
class Step:
    """One step, judged alone; errors are relative, over the tokens that count.

    Attributes:
        path: where its result is tapped.
        free: distance of a and b when each runs by itself, what it inherits included.
        fed_a: distance of b's result and what a makes of b's values; None: not asked.
        fed_b: of a's result and what b makes of a's values.
        local_a: error of a, of what the oracle makes of a's own values; None: no oracle.
        local_b: likewise of b.
        limit: what the side nearest to it, or furthest over, may be off.
        used: its share of that; above 1 the step is at fault.
        blame: ``a``, ``b`` or ``both``; ``unknown`` without an oracle; None when nothing is wrong.
    """

    path: str
    free: float
    fed_a: float | None
    fed_b: float | None
    local_a: float | None
    local_b: float | None
    limit: float
    used: float
    blame: str | None


@dataclass(frozen=True, repr=False)
class Bisection:
    """What was found.

    Attributes:
        names: of a and b.
        dtype: what both compute in.
        has_oracle: whether local errors were measured against it.
        tables: from the model down: what was looked into, and its steps in order, that itself last.
        notes: what the reader has to know.
    """

    names: tuple[str, str]
    dtype: str
    has_oracle: bool
    tables: tuple[tuple[str, tuple[Step, ...]], ...]
    notes: tuple[str, ...] = ()

    @property
    def culprit(self) -> Step | None:
        """The smallest step at fault; None: nothing stands out."""
        for index in range(len(self.tables) - 1, -1, -1):
            _, steps = self.tables[index]
            wrong = [step for step in steps if step.blame is not None]
            if wrong:
                return wrong[0] if index else max(wrong, key=lambda step: step.used)
        return None

    @property
    def exit_code(self) -> int:
        """0: nothing stands out, 1: something does."""
        return 0 if self.culprit is None else 1

    @property
    def summary(self) -> str:
        """One or two sentences."""
        culprit = self.culprit
        if culprit is None:
            steps = [step for _, table in self.tables for step in table]
            worst = max(steps, key=lambda step: step.used)
            return (
                f"Nothing stands out: each of {len(steps)} steps, judged alone, stays within its limit;"
                f" {worst.path} comes nearest, at {told_share(worst.used)}."
                f"{' What is too small for a layer to show, --everywhere may.' if len(self.tables) == 1 else ''}"
            )
        return f"{self._who(culprit)}{self._inside(culprit)} {self._rest(culprit)}"

    def noted(self, notes: Sequence[str]) -> Bisection:
        """The same with more notes."""
        return dataclasses.replace(self, notes=(*self.notes, *notes))

    def to_text(self) -> str:
        """The tables and the summary."""
        lines: list[str] = []
        for name, steps in self.tables:
            lines += [f"{name}:", *_table(steps, self.names, name), ""]
        told = [textwrap.fill(text, WIDTH, break_on_hyphens=False) for text in (*self._noted(), self.summary)]
        return "\n".join([*lines, *told])

    def _noted(self) -> list[str]:
        return [f"note: {note}" for note in self.notes]

    def __repr__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        from parity.report.tables import bisection_tables

        return bisection_tables(self)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON holds it; errors that are not finite as text."""
        found = dataclasses.asdict(self)
        found["tables"] = [
            {"of": name, "steps": [{k: _plain(v) for k, v in dataclasses.asdict(step).items()} for step in steps]}
            for name, steps in self.tables
        ]
        culprit = None if self.culprit is None else self.culprit.path
        return found | {"culprit": culprit, "summary": self.summary, "exit_code": self.exit_code}

    def _who(self, step: Step) -> str:
        a, b = self.names
        limit = f"({told_share(step.used)} of {number(step.limit)})"
        if any(name == step.path and step in steps for name, steps in self.tables):
            limit += f" in {REST}, given the results of its parts"
        if step.blame == "unknown":
            fed = max(one for one in (step.fed_a, step.fed_b) if one is not None)
            return f"{a} and {b} compute {step.path} differently: fed the same, they are {number(fed)} apart {limit}."
        errors = [error if error is not None else 0.0 for error in (step.local_a, step.local_b)]
        if step.blame == "both":
            off = f"{number(errors[0])} and {number(errors[1])}"
            return f"{a} and {b} both compute {step.path} differently from the oracle: local errors {off} {limit}."
        who, other = (a, b) if step.blame == "a" else (b, a)
        error, peer = errors if step.blame == "a" else errors[::-1]
        local = f"local error {number(error)} against {number(peer)} of {other}"
        return f"{who} computes {step.path} differently: {local} {limit}."

    def _inside(self, step: Step) -> str:
        if len(self.tables) == 1:
            return ""
        name, steps = self.tables[-1]
        wrong = [one.path for one in steps if one.blame is not None]
        if not wrong:
            return f" No step inside {name} stands out alone."
        right = " Each operation inside it is right on its own; the error appears in what it hands on."
        return right if step.path == name else ""

    def _rest(self, step: Step) -> str:
        _, steps = self.tables[0]
        wrong = [one.path for one in steps if one.blame is not None]
        others = [path for path in wrong if not _is_within(step.path, path) and not _is_within(path, step.path)]
        layer = next((path for path in wrong if path not in others and not path.endswith(".mlp.gate")), step.path)
        others = [path for path in others if not _is_within(path, layer)]
        if others:
            return f"So are, elsewhere: {', '.join(others)}."
        before = [one.path for one in steps if not _is_within(one.path, layer)]
        return "Everything before it agrees." if before and before[0] != layer else "Everything else agrees."


def _is_within(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")


def columns(steps: tuple[Step, ...], names: tuple[str, str], whole: str) -> list[list[str]]:
    """A table of steps by column, each with its head; columns that nothing stands in are left out.

    ``whole``: what they are the steps of, which stands above: their names are told without it. Its own line is what it
    makes of theirs.
    """
    a, b = names
    heads = ["step", "free run", f"{a} fed {b}'s", f"{b} fed {a}'s", f"{a} local", f"{b} local", "limit", "used", ""]
    rows = [heads]
    for step in steps:
        errors = (step.free, step.fed_a, step.fed_b, step.local_a, step.local_b, step.limit)
        blame = {"a": f"<- {a}", "b": f"<- {b}", "both": "<- both", "unknown": "<- differ", None: ""}[step.blame]
        said = ["" if error is None else number(error) for error in errors]
        name = f"({REST})" if step.path == whole else step.path.removeprefix(f"{whole}.")
        rows.append([name, *said, share(step.used), blame])
    return [list(column) for column in zip(*rows, strict=True) if any(column[1:])]


def _table(steps: tuple[Step, ...], names: tuple[str, str], whole: str) -> list[str]:
    """Lines of a table."""
    table = columns(steps, names, whole)
    widths = [max(map(len, column)) for column in table]
    is_text = [column[0] in ("step", "") for column in table]
    lines = []
    for row in zip(*table, strict=True):
        cells = [x.ljust(w) if left else x.rjust(w) for x, w, left in zip(row, widths, is_text, strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
