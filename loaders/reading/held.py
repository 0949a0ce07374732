"""What one process of a mesh holds where layers run on that alone: no compiler sends them what else they ask for.

The table is that of ``loaders.axes``. Of an axis on which several things lie one after the other, such as a gated delta
net's queries, keys and values, a process holds its heads of each, joined: one box of the parameter for each of them.

Where heads of keys and values are cut by fewer axes than query heads, a process holds weights of some that its own
queries do not ask for: it drops those once they are computed, and keeps the others alone.

An axis along which one parameter has codes in blocks is cut between blocks in all of them, or in none: what one layer
says along it is what the next is given.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loaders.axes import DELTA_HEADS, LOGICAL_AXES, SHARING, Cut, axes_of, axis_cut, cut_of, wanted_axes
from loaders.quantization.schemes import BLOCK
from loaders.reading.regions import Box
from loaders.spec import Dim, ParamSpec, dim_of

HEADS = frozenset((*SHARING, *SHARING.values()))
Runs = list[tuple[int, int]]  # start and stop of what is here along an axis, in order


@dataclass(frozen=True)
class Asked:
    """The heads of keys and values that the query heads of one process ask for, several in a row the same.

    Attributes:
        heads: which, of those whose weights are here.
        queries: how many of the query heads here ask for each.
    """

    heads: slice
    queries: tuple[int, ...]

    @property
    def is_even(self) -> bool:
        """Whether as many ask for each."""
        return len(set(self.queries)) == 1


@dataclass(frozen=True)
class Held:
    """The place of a process on a mesh, and what follows from it.

    Attributes:
        sizes: of the mesh: axis -> processes.
        place: of this process along each.
        dims: the axes of the config.
        in_blocks: the letters of axes along which a parameter has codes in blocks.
    """

    sizes: Mapping[str, int]
    place: Mapping[str, int]
    dims: dict[str, Dim]
    in_blocks: frozenset[str] = frozenset()

    def cuts(self, spec: ParamSpec) -> tuple[Cut, ...]:
        """What cuts every axis of a parameter."""
        return tuple(self._cut(axis, axes) for axis, axes in zip(spec.axes, wanted_axes(spec), strict=True))

    def boxes(self, spec: ParamSpec) -> list[Box]:
        """The parts of a parameter that are here, in their order along the one axis that has several."""
        return list(itertools.product(*self.runs(spec)))

    def runs(self, spec: ParamSpec) -> list[Runs]:
        """What is here along every axis of a parameter."""
        parts = zip(spec.axes, spec.shape, self.cuts(spec), strict=True)
        return [self._ends_of(axis, size, cut) for axis, size, cut in parts]

    def segments(self, axis: str) -> list[int]:
        """How much is here of each of those things that lie one after the other along an axis."""
        cut = self._cut(axis, LOGICAL_AXES.get(axis.partition("/")[0], ()))
        dim = dim_of(axis, self.dims)
        return [self.share(one.size, cut) for one in dim.segments or (dim,)]

    def shape(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
        """How much is here of what has these axes and this shape, when whole: of what a layer keeps."""
        cuts = (self._cut(axis, LOGICAL_AXES.get(axis, ())) for axis in axes)
        found = zip(axes, shape, cuts, strict=True)
        return tuple(len(self.asked().queries) if axis == "KH" else self.share(size, cut) for axis, size, cut in found)

    def asked(self) -> Asked:
        """The heads of keys and values that the query heads here ask for."""
        queries, keys = (self.dims[axis].units or self.dims[axis].size for axis in ("NH", "KH"))
        own, there = (self._cut(axis, LOGICAL_AXES[axis]) for axis in ("NH", "KH"))
        first, last = self.ends(keys, there)
        times = Counter(head * keys // queries for head in range(*self.ends(queries, own)))
        heads = range(min(times), max(times) + 1)
        assert first <= heads.start < heads.stop <= last, f"{heads=} where {first} to {last} are"
        return Asked(slice(heads.start - first, heads.stop - first), tuple(times[head] for head in heads))

    def share(self, size: int, cut: Cut) -> int:
        """How much of so much is here."""
        start, stop = self.ends(size, cut)
        return stop - start

    def ends(self, size: int, cut: Cut) -> tuple[int, int]:
        """Which of so many are here: the first, and the one after the last."""
        index, count = 0, 1
        for axis in axes_of(cut):  # the first of them is the outermost
            index, count = index * self.sizes[axis] + self.place[axis], count * self.sizes[axis]
        return index * size // count, (index + 1) * size // count

    def sizes_of(self, spec: ParamSpec) -> tuple[int, ...]:
        """The shape of what is here of a parameter."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self.runs(spec))

    def _ends_of(self, axis: str, size: int, cut: Cut) -> Runs:
        if cut is None or not (segments := dim_of(axis, self.dims).segments):
            return [self.ends(size, cut)]
        starts = itertools.accumulate((one.size for one in segments), initial=0)
        found = [(start, *self.ends(one.size, cut)) for start, one in zip(starts, segments, strict=False)]
        return [(start + first, start + last) for start, first, last in found]

    def _cut(self, axis: str, axes: tuple[str, ...]) -> Cut:
        """As ``loaders.axes`` has it; but value heads lie where their key heads are, or all of both are everywhere.

        So do the heads of attention where those are no whole blocks, and any width is cut as its blocks are.
        """
        letter = axis.partition("/")[0]
        if letter in DELTA_HEADS:
            heads = [one.units or one.size for one in self.dims["QKV"].segments]
            return cut_of(self.sizes, axes, math.gcd(*heads, *self._blocks(DELTA_HEADS)))
        if letter not in HEADS:
            return axis_cut(f"{letter}/{BLOCK}" if letter in self.in_blocks else axis, axes, self.dims, self.sizes)
        blocks = (axis_cut(f"{one}/{BLOCK}", axes, self.dims, self.sizes) for one in HEADS & self.in_blocks)
        return None if None in blocks else axis_cut(axis, axes, self.dims, self.sizes)

    def _blocks(self, letters: Iterable[str]) -> list[int]:
        """In how many units the blocks along those of ``letters`` may be cut that have any."""
        return [dim_of(f"{one}/{BLOCK}", self.dims).units or 1 for one in letters if one in self.in_blocks]


def in_blocks(specs: Iterable[ParamSpec]) -> frozenset[str]:
    """The letters of axes along which any of these has codes in blocks."""
    return frozenset(axis.partition("/")[0] for spec in specs for axis in spec.axes if "/" in axis)
