"""Bytes that one run of a compiled program reads from and writes to HBM, and what its devices send each other.

XLA's own ``bytes accessed`` counts a copy to VMEM ahead of use several times over, the body of a loop once, and of a
cache everything though one row is written. Here: arrays in VMEM cost nothing, a slice costs the slice, an update in
place the update, a loop as often as it runs, an asynchronous copy once, a kernel (custom call) all of its operands, but
for ours that reads the heads of a cache which its queries ask for: of that what it says itself.

Bytes are those of whole tiles, as the arrays lie in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from parity.hlo.loops import trips
from parity.hlo.module import HBM, Array, Computation, Instruction, Module, Shape, arrays

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
# no bytes move: names, views, and the second halves of what was counted when it started
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id add-dependency"
    " optimization-barrier copy-done send-done recv-done".split()
)
_FREE_CALLS = ("ConcatBitcast", "ResizeBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding")
_WHOLE_IN_ONE = "all-reduce-scatter"  # fusions of that name, whose collectives all have one channel
_VIEWS = ("bitcast", "reshape")
_STATED = "attend_held"  # what our kernel over caches is called


@dataclass(slots=True)
class Traffic:
    """Of one run, on one device.

    Attributes:
        read_bytes: from HBM.
        written_bytes: to HBM.
        collectives: kind -> how many run, and the bytes of the larger of what each takes and gives.
        unknown_loops: whose length only a run knows; their bodies are counted once.
        heaviest: instruction -> bytes it reads and writes, all its runs together.
    """

    read_bytes: int = 0
    written_bytes: int = 0
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)
    unknown_loops: list[str] = field(default_factory=list)
    heaviest: Counter[str] = field(default_factory=Counter)

    @property
    def hbm_bytes(self) -> int:
        """Read and written."""
        return self.read_bytes + self.written_bytes

    def add(self, other: Traffic, times: int = 1) -> None:
        """Count what else runs, so many times."""
        self.read_bytes += other.read_bytes * times
        self.written_bytes += other.written_bytes * times
        for kind, found in other.collectives.items():
            mine = self.collectives.setdefault(kind, {"count": 0, "bytes": 0})
            mine["count"] += found["count"] * times
            mine["bytes"] += found["bytes"] * times
        self.unknown_loops += other.unknown_loops
        for name, size in other.heaviest.items():
            self.heaviest[name] += size * times


def traffic_of(text: str) -> Traffic:
    """Of the program whose optimised HLO text this is.

    Raises:
        ValueError: it is not the text of an HLO module.
    """
    module = Module.parse(text)
    return Walk(module).run(module.entry)


class Walk:
    """Over the computations of a module, each counted once."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.done: dict[str, Traffic] = {}
        self.continued: set[str] = set()  # collectives that began in a fusion before and go on beside another one

    def run(self, name: str) -> Traffic:
        """What running a computation once costs."""
        if name not in self.done:
            total = Traffic()
            for _, found in self.each(name):
                total.add(found)
            self.done[name] = total
        return self.done[name]

    def each(self, name: str) -> Iterator[tuple[Instruction, Traffic]]:
        """The instructions of a computation in the order they run, and what each costs."""
        inside = self.module.computations[name]
        repeated, begun = _fetched_again(inside), set[str]()
        for one in inside.instructions.values():
            for inner, _, called in self.sent_inside(one) if one.opcode == "fusion" else ():
                if called.name.startswith(_WHOLE_IN_ONE):
                    continue
                channel = inner.attribute("channel_id")
                if channel in begun:
                    self.continued.add(inner.name)
                elif channel is not None:
                    begun.add(channel)
            yield one, Traffic() if one.name in repeated else self.instruction(one, inside)

    def instruction(self, one: Instruction, inside: Computation) -> Traffic:
        opcode = one.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")) and opcode not in ("send", "recv"):
            return Traffic()
        if opcode == "while":
            return self.loop(one, inside)
        if opcode == "conditional":
            return max((self.run(name) for name in _branches(one)), key=lambda found: found.hbm_bytes)
        if opcode in ("call", "call-start", "async-start"):  # the second: for a SparseCore, as collectives of tpu7x
            return self.run(one.attribute("to_apply") or one.attribute("calls") or "")
        if opcode == "custom-call" and one.target in _FREE_CALLS:
            return Traffic()
        found = Traffic()
        base = opcode.removesuffix("-start")
        result = _result(one)
        if base in COLLECTIVES:
            _send(found, base, one, inside)
        elif opcode == "fusion":
            for inner, kind, called in self.sent_inside(one):
                if inner.name not in self.continued:
                    _send(found, kind, inner, called)
        for position, operand in enumerate(one.operands):
            found.read_bytes += self.read(one, base, position, inside.instructions[operand].shape, inside)
        found.written_bytes += self.written(one, base, result, inside)
        if opcode == "custom-call" and one.name.startswith(_STATED):
            found.read_bytes = min(found.read_bytes, one.stated_bytes or found.read_bytes)
        if found.hbm_bytes:
            found.heaviest[one.name] = found.hbm_bytes
        return found

    def loop(self, one: Instruction, inside: Computation) -> Traffic:
        times, found = trips(self.module, one, inside), Traffic()
        if times is None:
            found.unknown_loops.append(one.name)
        for role in ("body", "condition"):
            found.add(self.run(one.attribute(role) or ""), 1 if times is None else times)
        return found

    def read(self, one: Instruction, base: str, position: int, shape: Shape, inside: Computation) -> int:
        """Bytes an instruction reads of one operand."""
        whole = _in_hbm(shape)
        if not whole:
            return 0
        if base == "fusion":
            called = self.module.computations[one.attribute("calls") or ""]
            return min(whole, self.used(called, called.parameters[position], whole))
        return min(whole, self._part(one, base, position, whole, inside))

    def used(self, inside: Computation, value: Instruction, whole: int) -> int:
        """Bytes that a fused computation reads of one of its values: slices where it is only sliced."""
        total = 0
        for user in inside.users(value.name):
            for position, operand in enumerate(user.operands):
                if operand != value.name or user.opcode == "tuple" or user.name in self.continued:
                    continue
                if user.opcode in _VIEWS:
                    total += whole if user.name == inside.root else self.used(inside, user, whole)
                elif user.opcode == "fusion":
                    total += self._used_by(inside, user, position, whole)
                else:
                    total += self._part(user, user.opcode, position, whole, inside)
        return min(total, whole)

    def _used_by(self, inside: Computation, user: Instruction, position: int, whole: int) -> int:
        """Bytes that a fusion inside another one reads; one that only views what it is given is looked behind.

        So does a copy that is said to be its operand's own memory: tpu7x has other tiles in it, and then slices that.
        """
        called = self.module.computations[user.attribute("calls") or ""]
        seen = called.instructions[called.root]
        is_same = f"output_to_operand_aliasing={{{{}}: ({position}, {{}})}}" in user.attributes
        while seen.opcode in _VIEWS or (is_same and seen.opcode == "copy"):
            seen = called.instructions[seen.operands[0]]
        if seen.opcode == "parameter" and int(seen.given) == position and user.name != inside.root:
            return self.used(inside, user, whole)
        return self.used(called, called.parameters[position], whole)

    def _part(self, one: Instruction, base: str, position: int, whole: int, inside: Computation) -> int:
        """Bytes of an operand, ``whole`` of them in all, that an operation looks at."""
        if base in ("slice", "dynamic-slice", "gather") and position == 0:
            return sum(array.bytes for array in arrays(_result(one)))
        if base == "dynamic-update-slice" and position == 0:
            return 0 if self._in_place(one, inside) else whole
        if base == "scatter" and position == 0:  # rows are read, changed and written
            return _size(inside.instructions[one.operands[-1]].shape)
        return whole

    def written(self, one: Instruction, base: str, result: Shape, inside: Computation) -> int:
        """Bytes an instruction writes: of an update in place the update."""
        if base == "fusion":
            called = self.module.computations[one.attribute("calls") or ""]
            root = called.instructions[called.root]
            parts = list(arrays(result))
            if root.opcode == "tuple":
                made = [called.instructions[name] for name in root.operands]
                if len(made) == len(parts):
                    return sum(self._made(called, part, array) for part, array in zip(made, parts, strict=True))
            return self._made(called, root, parts[0]) if len(parts) == 1 else _in_hbm(result)
        if base == "dynamic-update-slice" and self._in_place(one, inside):
            return min(_in_hbm(result), _size(inside.instructions[one.operands[1]].shape))
        if base == "scatter":
            return min(_in_hbm(result), _size(inside.instructions[one.operands[-1]].shape))
        return _in_hbm(result)

    def _made(self, inside: Computation, one: Instruction, result: Array) -> int:
        """Bytes that one result of a fused computation costs."""
        while one.opcode in _VIEWS:
            one = inside.instructions[one.operands[0]]
        if one.opcode == "parameter" or one.name in self.continued:  # handed through
            return 0
        if result.space != HBM:
            return 0
        if one.opcode == "fusion":
            return min(result.bytes, self.written(one, "fusion", result, inside))
        if one.opcode in ("dynamic-update-slice", "scatter"):
            return min(result.bytes, self.written(one, one.opcode, result, inside))
        return result.bytes

    def _in_place(self, one: Instruction, inside: Computation) -> bool:
        """Whether an update writes into the very array it is given: not where that lies in another memory."""
        given = inside.instructions[one.operands[0]]
        return next(arrays(given.shape)).space == next(arrays(one.shape)).space

    def sent_inside(self, one: Instruction) -> Iterator[tuple[Instruction, str, Computation]]:
        """Collectives that were fused, their kinds, and where they stand."""
        called = self.module.computations[one.attribute("calls") or ""]
        for inner in called.instructions.values():
            base = inner.opcode.removesuffix("-start")
            if base in COLLECTIVES:
                yield inner, base, called
            elif inner.opcode == "fusion":
                yield from self.sent_inside(inner)


def _send(found: Traffic, kind: str, one: Instruction, inside: Computation) -> None:
    taken = sum(_size(inside.instructions[name].shape) for name in one.operands)
    entry = found.collectives.setdefault(kind, {"count": 0, "bytes": 0})
    entry["count"] += 1
    entry["bytes"] += max(taken, _size(_result(one)))


def _result(one: Instruction) -> Shape:
    """What an instruction gives: of one that starts, what will be there when it is done."""
    if not one.opcode.endswith("-start") or isinstance(one.shape, Array) or one.opcode == "all-reduce-start":
        return one.shape
    return one.shape[0] if one.opcode == "copy-start" else one.shape[1]


def _size(shape: Shape) -> int:
    return sum(array.bytes for array in arrays(shape))


def _in_hbm(shape: Shape) -> int:
    return sum(array.bytes for array in arrays(shape) if array.space == HBM)


def _branches(one: Instruction) -> list[str]:
    named = [one.attribute(f"{which}_computation") for which in ("true", "false")]
    listed = one.attributes.partition("branch_computations={")[2].partition("}")[0]
    return [name for name in named if name] or [name.strip().lstrip("%") for name in listed.split(",")]


def _fetched_again(inside: Computation) -> set[str]:
    """Copies to VMEM that the run before has made: what a program fetches ahead it fetches again at its end."""
    starts = [one for one in inside.instructions.values() if one.opcode == "copy-start"]
    first = {one.operands[0]: one.name for one in starts if "cross_program_prefetch_index" in one.attributes}
    again = {one.operands[0] for one in starts if one.operands[0] in first and one.name != first[one.operands[0]]}
    done = {one.operands[0]: one.name for one in inside.instructions.values() if one.opcode == "copy-done"}
    unused = {one.operands[0] for one in starts if one.name in done and not inside.users(done[one.name])}
    return {first[operand] for operand in again & unused}
