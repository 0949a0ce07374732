"""How often a loop of an HLO module runs, read from its condition, its start and what its body adds."""

from __future__ import annotations

import re
from dataclasses import dataclass

from parity.hlo.module import Computation, Instruction, Module

_THROUGH = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start", "optimization-barrier")
_TURNED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}
_KNOWN = re.compile(r'known_trip_count[^}]*?"?n"?:"?(\d+)')


@dataclass(frozen=True, slots=True)
class _Carried:
    """Element ``index`` of what the loop carries, plus a number."""

    index: int
    plus: int = 0


_Value = int | _Carried | None


def trips(module: Module, loop: Instruction, around: Computation) -> int | None:
    """Times the body of a ``while`` runs; None: it depends on values that only the run knows."""
    condition = module.computations[loop.attribute("condition") or ""]
    body = module.computations[loop.attribute("body") or ""]
    found = _compared(module, condition)
    if found is not None:
        left, right, direction = found
        if isinstance(left, int):
            left, right, direction = right, left, _TURNED.get(direction, direction)
        if isinstance(left, _Carried):
            after = _element(module, body, body.instructions[body.root], left.index)
            step = after.plus if isinstance(after, _Carried) and after.index == left.index else 0
            start = _number(module, around, loop, left.index)
            limit = right if isinstance(right, int) else _constant(module, body, around, loop, right)
            if step and start is not None and limit is not None:
                return _count(start + left.plus, limit, step, direction)
    known = _KNOWN.search(loop.attributes)
    return int(known[1]) if known else None


def _count(start: int, limit: int, step: int, direction: str) -> int | None:
    distance = (limit - start) * (1 if step > 0 else -1)
    expected = {"LT": step > 0, "LE": step > 0, "GT": step < 0, "GE": step < 0, "NE": True}
    if not expected.get(direction, False):
        return None
    if direction == "NE" and distance % abs(step):
        return None
    distance += direction in ("LE", "GE")
    return max(0, -(-distance // abs(step)))


def _compared(module: Module, condition: Computation) -> tuple[_Value, _Value, str] | None:
    """Both sides of the comparison that a condition is, and its direction."""
    root, arguments, inside = condition.instructions[condition.root], None, condition
    if root.opcode == "fusion":
        arguments = [_value(module, condition, name) for name in root.operands]
        inside = module.computations[root.attribute("calls") or ""]
        root = inside.instructions[inside.root]
    while root.opcode in _THROUGH:
        root = inside.instructions[root.operands[0]]
    if root.opcode != "compare":
        return None
    left, right = (_value(module, inside, name, arguments) for name in root.operands)
    return left, right, root.attribute("direction") or ""


def _constant(module: Module, body: Computation, around: Computation, loop: Instruction, limit: _Value) -> int | None:
    """A limit that the loop carries unchanged."""
    if not isinstance(limit, _Carried) or limit.plus:
        return None
    kept = _element(module, body, body.instructions[body.root], limit.index)
    return _number(module, around, loop, limit.index) if kept == limit else None


def _number(module: Module, around: Computation, loop: Instruction, index: int) -> int | None:
    """What an element is before the loop, where that is a constant."""
    found = _element(module, around, around.instructions[loop.operands[0]], index)
    return found if isinstance(found, int) else None


def _element(module: Module, inside: Computation, of: Instruction, index: int) -> _Value:
    return _value(module, inside, of.operands[index]) if of.opcode == "tuple" else None


def _value(module: Module, inside: Computation, name: str, arguments: list[_Value] | None = None) -> _Value:
    """A constant, an element of the loop's tuple plus a constant, or None; ``arguments``: of the fusion it is in."""
    one = inside.instructions[name]
    if one.opcode == "constant":
        return int(one.given) if re.fullmatch(r"-?\d+", one.given) else None
    if one.opcode == "parameter":
        return arguments[int(one.given)] if arguments else None
    if one.opcode == "get-tuple-element":
        source = inside.instructions[one.operands[0]]
        number = int(one.attribute("index") or 0)
        if source.opcode == "parameter" and arguments is None:
            return _Carried(number)
        return _element(module, inside, source, number)
    if one.opcode in _THROUGH:
        return _value(module, inside, one.operands[0], arguments)
    if one.opcode in ("add", "subtract"):
        left, right = (_value(module, inside, operand, arguments) for operand in one.operands)
        return _sum(left, right, -1 if one.opcode == "subtract" else 1)
    if one.opcode == "fusion":
        given = [_value(module, inside, operand, arguments) for operand in one.operands]
        called = module.computations[one.attribute("calls") or ""]
        return _value(module, called, called.root, given)
    return None


def _sum(left: _Value, right: _Value, sign: int) -> _Value:
    if isinstance(left, int) and isinstance(right, int):
        return left + sign * right
    if isinstance(left, _Carried) and isinstance(right, int):
        return _Carried(left.index, left.plus + sign * right)
    if isinstance(left, int) and isinstance(right, _Carried) and sign == 1:
        return _Carried(right.index, right.plus + left)
    return None
