"""Weights held against each other, for a terminal: roots first, then what differs, layers of one kind in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from parity.weights import WeightComparison, WeightDifference

GROUPS_SHOWN = 24
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def render(found: WeightComparison, *, everything: bool = False) -> str:
    """The verdict, both roots, and one line for each group of tensors that differ alike."""
    width = max(map(len, found.labels))
    lines = [_headline(found)]
    for label, root, count in zip(found.labels, found.roots, found.counts, strict=True):
        lines.append(f"  {label:{width}}  {count} tensors, root {root[:16]}")
    if found.left_out:
        some = ", ".join(found.left_out[:2]) + (", ..." if len(found.left_out) > 2 else "")
        lines.append(f"  not compared: {len(found.left_out)} on one side alone, as declared or tied ({some})")
    if found.differences and found.is_comparable:
        lines.append("")
        lines += [_line(one) for one in found.differences] if everything else _grouped(found.differences)
    return "\n".join(lines)


def _headline(found: WeightComparison) -> str:
    a, b = found.labels
    if not found.is_comparable:
        return f"NOT COMPARABLE: no tensor has one name in {a} and in {b}. Are they of one model?"
    if not found.differences:
        return f"SAME: {found.equal} tensors are equal bit for bit, one root."
    kinds = {where: sum(one.where == where for one in found.differences) for where in ("both", "a", "b")}
    parts = [f"{kinds['both']} of {found.equal + kinds['both']} tensors differ"]
    parts += [f"{kinds[side]} only in {label}" for side, label in zip("ab", found.labels, strict=True) if kinds[side]]
    return f"DIFFERS: {', '.join(parts)}."


def _grouped(differences: Sequence[WeightDifference]) -> list[str]:
    """Tensors whose names differ in numbers alone, and that differ in the same way, by their worst."""
    groups: dict[tuple[str, str, str], list[WeightDifference]] = {}
    for one in differences:
        key = (_NUMBER.sub("*", one.name), one.where, "other" if one.same_as else one.accident or "")
        groups.setdefault(key, []).append(one)
    lines = []
    for (pattern, _, _), members in list(groups.items())[:GROUPS_SHOWN]:
        worst = max(members, key=_severity)
        if len(members) == 1:
            lines.append(_line(worst))
        else:
            lines.append(f"  {pattern}: {len(members)} tensors, worst\n  {_line(worst)}")
    if len(groups) > GROUPS_SHOWN:
        rest = sum(len(members) for members in list(groups.values())[GROUPS_SHOWN:])
        lines.append(f"  ... and {rest} more tensors in {len(groups) - GROUPS_SHOWN} groups; --all lists every one")
    return lines


def _severity(one: WeightDifference) -> float:
    if one.diff is None:
        return 0.0
    return one.diff.elements / one.diff.size if one.diff.rel_l2 is None else one.diff.rel_l2


def _line(one: WeightDifference) -> str:
    parts = [] if one.where == "both" else [f"only in the {'first' if one.where == 'a' else 'second'}"]
    if one.types:
        parts.append(one.types[0] if one.types[0] == one.types[1] else f"{one.types[0]} against {one.types[1]}")
    if one.diff:
        parts.append(str(one.diff))
    if one.same_as:
        parts.append(f"equals {one.same_as} of the second")
    if one.accident:
        parts.append(f"accident: {one.accident}")
    return f"  {one.name}: {'; '.join(parts)}" if parts else f"  {one.name}"
