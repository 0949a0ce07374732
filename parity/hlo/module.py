"""The text of an optimised HLO module, as computations and instructions with the memory their arrays live in.

``compiled.as_text()`` of JAX, or a dump of XLA, after scheduling and memory assignment. Format: XLA's ``hlo_parser``;
layouts as ``{1,0:T(8,128)(2,1)S(1)}``: axes from minor to major, tiles, and the memory space, HBM where none is said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

HBM, VMEM = 0, 1
_ARRAY = re.compile(r"(?P<kind>[a-z]\w*)\[(?P<dims>[\d,<=]*)\](?:\{(?P<layout>[^}]*)\})?")
_TILE = re.compile(r"T((?:\([\d,*]*\))+)")
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\{$")
_LINE = re.compile(r"^  (?P<root>ROOT )?%(?P<name>\S+) = ")
_COMMENT = re.compile(r"/\*.*?\*/")
_SPREAD = re.compile(r'\{\n((?:"[^\n]*\n)+)\}')  # what a kernel says of itself, on lines of its own
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclass(frozen=True, slots=True)
class Array:
    """One array: element type, axes from major to minor as laid out, the tile they are padded to, memory space."""

    kind: str
    dims: tuple[int, ...]
    physical: tuple[int, ...]
    tile: tuple[int, ...]
    space: int
    bits: int

    @property
    def bytes(self) -> int:
        """What it takes in memory: the minor axes are rounded up to whole tiles."""
        rank = max(len(self.physical), len(self.tile))
        sizes = (1,) * (rank - len(self.physical)) + self.physical
        tiles = (1,) * (rank - len(self.tile)) + self.tile
        return math.prod(-(-size // tile) * tile for size, tile in zip(sizes, tiles, strict=True)) * self.bits // 8


Shape = Array | tuple[Any, ...]  # an array, or a tuple of shapes


def arrays(shape: Shape) -> Iterator[Array]:
    """Every array of a shape, in order."""
    if isinstance(shape, Array):
        yield shape
        return
    for part in shape:
        yield from arrays(part)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line. ``given`` is what stands between the operator's parentheses, ``attributes`` what follows them."""

    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...]
    given: str
    attributes: str

    def attribute(self, key: str) -> str | None:
        """``calls=%name`` as ``name``; of any attribute that is one word."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def stated_bytes(self) -> int | None:
        """What a custom call says that it reads and writes, in HBM or not; None: it says nothing."""
        found = re.search(r'"bytes_accessed":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    @property
    def source(self) -> str:
        """What the program called it: JAX's name of the operation, with the functions around it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass(slots=True)
class Computation:
    """Instructions by name, in the order they run."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    @property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        return {int(one.given): one for one in self.instructions.values() if one.opcode == "parameter"}

    def users(self, name: str) -> list[Instruction]:
        """Whatever takes the value of an instruction."""
        return [one for one in self.instructions.values() if name in one.operands]


@dataclass(frozen=True, slots=True)
class Module:
    """A program for one device."""

    computations: dict[str, Computation]
    entry: str

    @classmethod
    def parse(cls, text: str) -> Module:
        """Read a module.

        Raises:
            ValueError: the text is no HLO module, or a line of it is not understood.
        """
        computations: dict[str, Computation] = {}
        entry, current = "", None
        for number, line in enumerate(_SPREAD.sub(_on_one_line, text).splitlines(), 1):
            if header := _HEADER.match(line):
                current = computations.setdefault(header["name"], Computation(header["name"]))
                entry = header["name"] if header["entry"] else entry
            elif line.startswith("}"):
                current = None
            elif current is not None and line.strip():
                instruction, is_root = _instruction(line, number)
                current.instructions[instruction.name] = instruction
                current.root = instruction.name if is_root else current.root
        if not entry:
            raise ValueError("no ENTRY computation: expected the text of an optimised HLO module (compiled.as_text())")
        return cls(computations, entry)


def _on_one_line(found: re.Match[str]) -> str:
    return "{" + found[1].replace("\n", " ") + "}"


def _instruction(line: str, number: int) -> tuple[Instruction, bool]:
    text = _COMMENT.sub("", line)
    head = _LINE.match(text)
    if head is None:
        raise ValueError(f"line {number} is {line[:120]!r}, expected an HLO instruction, '%name = type opcode(...)'")
    end = _closing(text, head.end()) if text[head.end()] == "(" else text.index(" ", head.end())
    opening = text.index("(", end)
    closing = _closing(text, opening)
    given = text[opening + 1 : closing - 1]
    opcode = text[end:opening].strip()
    operands = () if opcode in ("constant", "parameter") else tuple(_OPERAND.findall(given))
    shape = parse_shape(text[head.end() : end])
    return Instruction(head["name"], opcode, shape, operands, given, text[closing:]), bool(head["root"])


def _closing(text: str, opening: int) -> int:
    """Just behind the parenthesis that closes the one at ``opening``."""
    depth = 0
    for position in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    raise ValueError(f"a parenthesis is never closed: {text[opening : opening + 80]!r}")


def parse_shape(text: str) -> Shape:
    """A type: ``bf16[8,128]{1,0:T(8,128)(2,1)}``, or several in parentheses."""
    text = text.strip()
    if not text.startswith("("):
        found = _ARRAY.match(text)
        if found is None:
            raise ValueError(f"{text[:80]!r} is no type of HLO")
        return _array(found)
    parts, start, depth = [], 1, 0
    for position, letter in enumerate(text):
        depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(letter, 0)
        if (letter == "," and depth == 1) or depth == 0:
            if part := text[start:position].strip():
                parts.append(parse_shape(part))
            start = position + 1
        if depth == 0:
            break
    return tuple(parts)


def _array(found: re.Match[str]) -> Array:
    kind, layout = found["kind"], found["layout"] or ""
    dims = tuple(int(size.removeprefix("<=")) for size in found["dims"].split(",") if size)
    order, _, rest = layout.partition(":")
    minor_first = [int(axis) for axis in order.split(",") if axis] or list(range(len(dims)))[::-1]
    tile = _TILE.search(rest)
    first = tile[1][1:].partition(")")[0].split(",") if tile else []
    space, width = re.search(r"S\((\d+)\)", rest), re.search(r"E\((\d+)\)", rest)
    sizes = tuple(1 if size == "*" else int(size) for size in first if size)
    bits = int(width[1]) if width else _bits(kind)
    return Array(
        kind, dims, tuple(dims[axis] for axis in reversed(minor_first)), sizes, int(space[1]) if space else HBM, bits
    )


def _bits(kind: str) -> int:
    """Of an element: ``bf16``, ``f8e4m3fn``, ``s4``; a token has none."""
    if kind == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", kind)
    return int(found[1]) if found else 0
