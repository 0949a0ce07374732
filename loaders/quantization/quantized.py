"""A checkpoint seen through quantisation: the same source, its matrices in NVFP4, quantised while they are read.

It is a checkpoint like any other, so it is loaded, reloaded, exported and written as those are.
``loaders.quantization.quantize`` makes it. Format and bits are ModelOpt's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from loaders.checkpoint import Checkpoint
from loaders.errors import CheckpointError
from loaders.nvfp4 import NVFP4Tensor, global_scale, quantize
from loaders.quantization.groups import Content, Gathered, Groups
from loaders.quantization.quantizable import Matrix
from loaders.quantization.schemes import Scheme
from loaders.reading.memory import check_budget
from loaders.reading.regions import Region
from loaders.reading.slices import Slice

THREADS = 2
ROWS_BYTES = 1 << 20  # looked at at once


@dataclass(frozen=True, repr=False)
class QuantizedCheckpoint(Checkpoint):
    """See the module.

    Attributes:
        plain: the checkpoint that is seen.
        matrices: what is quantised, by module.
        left_alone: modules that are not, and why.
        amax_of_inputs: by module, where inputs are to be quantised too.
    """

    plain: Checkpoint = field(kw_only=True)
    matrices: dict[str, Matrix] = field(kw_only=True)
    left_alone: dict[str, str] = field(kw_only=True)
    amax_of_inputs: Mapping[str, float] = field(kw_only=True)

    @cached_property
    def _groups(self) -> Groups:
        leaves = Scheme("nvfp4", activations=bool(self.amax_of_inputs)).leaves
        return Groups(self.plain, self.matrices, tuple(leaves.values()))

    @cached_property
    def _amax(self) -> dict[str, float]:
        """Of the groups seen so far."""
        return {}

    @cached_property
    def _kept(self) -> dict[str, np.ndarray]:
        """What the next ``read`` is likely to want: the experts' tensor it read last, and the rest of a matrix."""
        return {}

    def group_of(self, name: str) -> str:
        """Of a quantised tensor the group of its matrix, as all of that is read and quantised at once."""
        place = self._groups.places.get(name)
        return name if place is None else place.matrix.group

    def passing(self, names: Iterable[str]) -> dict[str, int]:
        """The plain tensors of every group that some of these are of; each takes what all do that are held with it."""
        return self._groups.passing(names)

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """One tensor; a quantised one is computed, from all the matrices of its group the first time."""
        if name not in self._groups.places:
            self._kept.clear()
            return self.plain.read(name, out)
        matrix, leaf = self._groups.places[name]
        place = None if out is None else self.destination(name, out)
        if matrix.group not in self._amax:
            members = self._groups.members[matrix.group]
            if problems := self._unquantisable(matrix.group, {one.module: self._weight(one) for one in members}):
                raise CheckpointError(self.source, problems)
        if leaf in ("weight_scale_2", "input_scale"):
            return _put(self._scalar(matrix, leaf), place)
        if name in self._kept:
            return _put(self._kept.pop(name), place)  # handed over, as it is the caller's from here on
        parts = self._parts(matrix, self._weight(matrix))
        for kept in self._kept.keys() & self._groups.places.keys():
            del self._kept[kept]
        self._kept.update(
            (f"{matrix.module}.{other}", parts[other]) for other in ("weight", "weight_scale") if other != leaf
        )
        return _put(parts[leaf], place)

    def fingerprint(self) -> str:
        """Of the checkpoint that is seen; ``load`` says beside it that it is quantised."""
        return self.plain.fingerprint()

    def stream(
        self,
        host_budget_bytes: int | None = None,
        *,
        names: Iterable[str] | None = None,
        lots: Iterable[Collection[str]] | None = None,
        into: Callable[[str], np.ndarray | None] | None = None,
    ) -> Generator[tuple[str, np.ndarray]]:
        """Tensors in the order of the plain files, those of a group together; see ``Checkpoint.stream``.

        By default the plain matrices of the largest group are held, or as many of others; a budget has to have room for
        those. Codes and scales are computed straight into their destinations. A lot has all or nothing of a group, and
        is read in lots of its own.
        """
        asked = list(self.lots_of(names, lots))
        check_budget(host_budget_bytes)
        if host_budget_bytes is not None:
            self._check_room({name for lot in asked for name in lot}, host_budget_bytes)
        return self._computed(asked, host_budget_bytes, into)

    def _check_room(self, names: Collection[str], budget: int) -> None:
        needed = self.passing(names)
        if needed and max(needed.values()) > budget:
            largest = max(needed, key=needed.__getitem__)
            raise ValueError(
                f"host_budget_bytes={budget} is less than what is quantised at once needs, at most {needed[largest]}"
                f" bytes ({largest} and what shares its scale). Give a larger budget."
            )

    def _computed(
        self, lots: list[Collection[str]], budget: int | None, into: Callable[[str], np.ndarray | None] | None
    ) -> Generator[tuple[str, np.ndarray]]:
        chosen, of_plain = {name for lot in lots for name in lot}, self._groups.plain_lots(lots)
        if budget is None:  # at least 1: a lot may be of empty tensors
            budget = max([1, *(sum(self.plain.tensors[name].num_bytes for name in lot) for lot in of_plain)])
        plain_into = (lambda name: None if name in self._groups.users else into(name)) if into else None
        stream = self.plain.stream(budget, lots=of_plain, into=plain_into)
        for name, array, weights in self._finite(self._groups.gathered(stream, chosen)):
            if weights is None:
                assert array is not None
                yield name, array
            else:
                yield from self._finished(weights, name, chosen, into)
            del array, weights

    def stream_slices(
        self,
        slices: Iterable[Slice],
        host_budget_bytes: int | None = None,
        *,
        into: Callable[[Slice], np.ndarray | None] | None = None,
    ) -> Iterator[tuple[Slice, np.ndarray]]:
        """As ``Checkpoint.stream_slices``; parts of what is quantised are cut from the whole, which is computed."""
        wanted: dict[str, list[Slice]] = {}
        for one in slices:
            one.bounds(self.stored_shape(one.name))
            wanted.setdefault(one.name, []).append(one)
        check_budget(host_budget_bytes)
        if host_budget_bytes is not None:
            self._check_room(wanted.keys(), host_budget_bytes)
        return self._cut(wanted, host_budget_bytes, into)

    def _cut(
        self,
        wanted: dict[str, list[Slice]],
        host_budget_bytes: int | None,
        into: Callable[[Slice], np.ndarray | None] | None,
    ) -> Iterator[tuple[Slice, np.ndarray]]:
        direct = [one for name, parts in wanted.items() if name not in self._groups.places for one in parts]
        yield from self.plain.stream_slices(direct, host_budget_bytes, into=into)
        for name, array in self.stream(host_budget_bytes, names=wanted.keys() & self._groups.places.keys()):
            for one in wanted[name]:
                out = self.destination(one, into(one) if into else None)
                out[...] = array[one.index]
                yield one, out
            del array

    def stream_regions(
        self,
        lots: Iterable[Collection[str]],
        wanted: Callable[[str], list[Region]],
        host_budget_bytes: int | None = None,
    ) -> Iterator[tuple[str, list[np.ndarray]]]:
        """See ``Checkpoint.stream_regions``. What is quantised is read whole, as its scale is of the largest of all.

        So is whatever shares a group with it; a group of which nothing is wanted is not read.
        """
        asked_for = [set(self.names_of(lot)) for lot in lots]
        check_budget(host_budget_bytes)
        return self._computed_regions(asked_for, wanted, host_budget_bytes)

    def _computed_regions(
        self, lots: list[set[str]], wanted: Callable[[str], list[Region]], host_budget_bytes: int | None
    ) -> Iterator[tuple[str, list[np.ndarray]]]:
        chosen, of_plain = {name for lot in lots for name in lot}, self._groups.plain_lots(lots)
        asked: dict[str, dict[str, list[Region]]] = {}  # of each group, once its first matrix is about to be read

        def regions(name: str) -> list[Region]:
            if name not in self._groups.users:
                return wanted(name)
            groups = {matrix.group for matrix in self._groups.users[name]} & self._groups.of(chosen)
            for group in groups - asked.keys():
                tensors = [tensor for tensor in self._groups.tensors(group) if tensor in chosen]
                asked[group] = {tensor: self.regions(tensor, wanted) for tensor in tensors}
            if not any(any(asked[group].values()) for group in groups):
                return []
            shape = self.plain.stored_shape(name)
            return [Slice(name).region(shape, self.plain.destination(name))]

        stream = self.plain.stream_regions(of_plain, regions, host_budget_bytes)
        for name, arrays, weights in self._finite(self._groups.gathered(stream, chosen)):
            if weights is None:
                assert arrays is not None
                yield name, arrays
            else:
                yield from self._put_into(asked.pop(name), weights, name)
            del arrays, weights

    def _put_into(
        self, regions: dict[str, list[Region]], weights: dict[str, np.ndarray | None], group: str
    ) -> Iterator[tuple[str, list[np.ndarray]]]:
        """The parts of a group's tensors that are wanted; where none is, nothing is computed."""
        if not any(regions.values()):
            yield from ((tensor, []) for tensor in regions)
            return
        for tensor, array in self._finished(weights, group, regions.keys(), None):
            for part in regions[tensor]:
                part.take(array)
            yield tensor, [part.out for part in regions[tensor]]

    def _finished(
        self,
        weights: dict[str, np.ndarray | None],
        group: str,
        chosen: Collection[str],
        into: Callable[[str], np.ndarray | None] | None,
    ) -> Iterator[tuple[str, np.ndarray]]:
        """A group's tensors of its matrices, which are let go of one by one."""
        read = {module: weight for module, weight in weights.items() if weight is not None}
        assert len(read) == len(self._groups.members[group]), f"{group} was read in part"
        weights.clear()
        for module in list(read):
            matrix = self.matrices[module]
            names = [f"{module}.{leaf}" for leaf in self._groups.leaves]
            places = {name: self._given(name, into) for name in names if name in chosen}
            given = _straight(places.get(f"{module}.weight")), _straight(places.get(f"{module}.weight_scale"))
            for leaf, array in self._parts(matrix, read.pop(module), given).items():
                if (name := f"{module}.{leaf}") in chosen:
                    yield name, _put(array, places.get(name))

    def _given(self, name: str, into: Callable[[str], np.ndarray | None] | None) -> np.ndarray | None:
        """Where a tensor is to go, if anybody says."""
        out = None if into is None else into(name)
        return None if out is None else self.destination(name, out)

    def _finite(self, found: Iterator[Gathered[Content]]) -> Iterator[Gathered[Content]]:
        """The same, each group's largest magnitude noted. From one that has none on only others like it are looked for.

        Raises:
            CheckpointError: at the end, with all of those.
        """
        problems: list[str] = []
        for name, content, weights in found:
            if weights is not None:
                problems += self._unquantisable(name, weights)
            if not problems:
                yield name, content, weights
            del content, weights
        if problems:
            raise CheckpointError(self.source, problems)

    def _unquantisable(self, group: str, weights: Mapping[str, np.ndarray | None]) -> list[str]:
        """What is wrong with a group's matrices, by module, None was not read; their largest magnitude is noted."""
        found = {module: _largest(weight) for module, weight in weights.items() if weight is not None}
        why = "cannot be quantised: its weights hold NaN or infinity, and NVFP4 has neither"
        problems = [f"{module} {why}" for module, largest in found.items() if not np.isfinite(largest)]
        if not problems and len(found) == len(weights):
            self._amax[group] = max(found.values())
        return problems

    def _parts(
        self, matrix: Matrix, weight: np.ndarray, out: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
    ) -> dict[str, np.ndarray]:
        try:
            found: NVFP4Tensor = quantize(weight, amax=self._amax[matrix.group], threads=THREADS, out=out)
        except ValueError as error:
            raise CheckpointError(self.source, [f"{matrix.module} cannot be quantised: {error}"]) from error
        parts = {"weight": found.packed, "weight_scale": found.block_scale}
        parts["weight_scale_2"] = self._scalar(matrix, "weight_scale_2")
        if matrix.module in self.amax_of_inputs:
            parts["input_scale"] = self._scalar(matrix, "input_scale")
        return parts

    def _scalar(self, matrix: Matrix, leaf: str) -> np.ndarray:
        amax = self._amax[matrix.group] if leaf == "weight_scale_2" else self.amax_of_inputs[matrix.module]
        return np.asarray(global_scale(amax), np.float32).reshape(())

    def _weight(self, matrix: Matrix) -> np.ndarray:
        if matrix.tensor not in self._kept:
            self._kept.clear()
            array = self.plain.read(matrix.tensor)
            if matrix.expert is None:
                return array
            self._kept[matrix.tensor] = array  # it holds all the experts, which are asked for one by one
        return matrix.of(self._kept[matrix.tensor])


def _largest(weight: np.ndarray) -> float:
    """The largest magnitude. Those of floats are in order as integers too, NaN last, and those NumPy is quick on.

    Some rows at a time: it takes no memory that a budget would have to count.
    """
    unsigned = np.dtype(f"u{weight.itemsize}")
    rows, sign = max(1, ROWS_BYTES * len(weight) // max(1, weight.nbytes)), np.iinfo(unsigned).max >> 1
    parts = (weight[start : start + rows].view(unsigned) & unsigned.type(sign) for start in range(0, len(weight), rows))
    largest = max((int(part.max(initial=0)) for part in parts), default=0)
    return float(unsigned.type(largest).view(weight.dtype))


def _straight(place: np.ndarray | None) -> np.ndarray | None:
    """A place that codes can be written to as they come; another one, a transposed one, gets a copy."""
    return place if place is not None and place.flags.c_contiguous else None


def _put(array: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    if out is None or out is array:
        return array
    out[...] = array
    return out
