"""A checkpoint seen through quantisation: the same source, its matrices in NVFP4, quantised while they are read.

It is a checkpoint like any other, so it is loaded, reloaded, exported and written as those are: what a trainer sends
in bfloat16 becomes the weights of an NVFP4 model (``load(..., quantize="nvfp4")``), and ``tandem quantize`` writes it
down. Format and bits are ModelOpt's.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from loaders.checkpoint import Checkpoint
from loaders.config import config_from_json
from loaders.errors import CheckpointError
from loaders.lots import Part, lots_of
from loaders.nvfp4 import NVFP4Tensor, global_scale, quantize
from loaders.opening import open_checkpoint
from loaders.quantizable import Matrix, documents, infos, matrices_of
from loaders.quantization import BLOCK, Scheme
from loaders.quantization_config import KEY
from loaders.regions import Region
from loaders.slices import Slice

THREADS = 2


@dataclass(frozen=True)
class QuantizedCheckpoint(Checkpoint):
    """See the module.

    Attributes:
        plain: the checkpoint that is seen.
        matrices: what is quantised, by module.
        left_alone: modules that are not, and why.
        amax_of_inputs: by module, where inputs are to be quantised too.
    """

    plain: Checkpoint = field(repr=False, kw_only=True)
    matrices: dict[str, Matrix] = field(repr=False, kw_only=True)
    left_alone: dict[str, str] = field(repr=False, kw_only=True)
    amax_of_inputs: Mapping[str, float] = field(repr=False, kw_only=True)

    @cached_property
    def _places(self) -> dict[str, tuple[Matrix, str]]:
        """Tensor -> its matrix, and which part of it: a leaf's name."""
        leaves = _scheme(bool(self.amax_of_inputs)).leaves.values()
        return {f"{matrix.module}.{leaf}": (matrix, leaf) for matrix in self.matrices.values() for leaf in leaves}

    @cached_property
    def _amax(self) -> dict[str, float]:
        """Of the groups seen so far."""
        return {}

    @cached_property
    def _groups(self) -> dict[str, list[Matrix]]:
        found: dict[str, list[Matrix]] = {}
        for matrix in self.matrices.values():
            found.setdefault(matrix.group, []).append(matrix)
        return found

    @cached_property
    def _users(self) -> dict[str, list[Matrix]]:
        """Plain tensor -> the matrices in it."""
        found: dict[str, list[Matrix]] = {}
        for matrix in self.matrices.values():
            found.setdefault(matrix.tensor, []).append(matrix)
        return found

    @cached_property
    def _kept(self) -> dict[str, np.ndarray]:
        """What the next ``read`` is likely to want: the experts' tensor it read last, and the rest of a matrix."""
        return {}

    def group_of(self, name: str) -> str:
        """Of a quantised tensor the group of its matrix, as all of that is read and quantised at once."""
        return self._places[name][0].group if name in self._places else name

    def passing(self, names: Iterable[str]) -> dict[str, int]:
        """The plain tensors of every group that some of these are of."""
        groups = {self._places[name][0].group for name in names if name in self._places}
        plain = {matrix.tensor for group in groups for matrix in self._groups[group]}
        return {name: self.plain.tensors[name].num_bytes for name in plain}

    def read(self, name: str, out: np.ndarray | None = None) -> np.ndarray:
        """One tensor; a quantised one is computed, from all the matrices of its group the first time."""
        if name not in self._places:
            self._kept.clear()
            return self.plain.read(name, out)
        matrix, leaf = self._places[name]
        if matrix.group not in self._amax:
            self._note_amax(matrix.group, [self._weight(one) for one in self._groups[matrix.group]])
        if leaf in ("weight_scale_2", "input_scale"):
            return _put(self._scalar(matrix, leaf), out)
        if name in self._kept:
            return _put(self._kept.pop(name), out)  # handed over, as it is the caller's from here on
        parts = self._parts(matrix, self._weight(matrix))
        for kept in [one for one in self._kept if one in self._places]:
            del self._kept[kept]
        self._kept.update(
            (f"{matrix.module}.{other}", parts[other]) for other in ("weight", "weight_scale") if other != leaf
        )
        return _put(parts[leaf], out)

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
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Tensors in the order of the plain files, those of a group together; see ``Checkpoint.stream``.

        By default the plain matrices of the largest group are held, or as many of others. A budget is for those that
        are on their way, and the matrices of a group are held beside it. Codes and scales are computed straight into
        their destinations. A lot has all or nothing of a group, and is read in lots of its own.
        """
        chosen: set[str] = set()
        of_plain: list[set[str]] = []
        for lot in self.lots_of(names, lots):
            chosen |= set(lot)
            groups = {self._places[name][0].group for name in lot if name in self._places}
            parts = [Part(it, it) for one in groups for it in [{matrix.tensor for matrix in self._groups[one]}]]
            parts += [Part({name}, {name}) for name in lot if name not in self._places]
            of_plain += lots_of(parts, self.plain.tensors)
        budget = host_budget_bytes
        if budget is None:  # at least 1: a lot may be of empty tensors
            budget = max([1, *(sum(self.plain.tensors[name].num_bytes for name in lot) for lot in of_plain)])
        plain_into = (lambda name: None if name in self._users else into(name)) if into else None
        stream = self.plain.stream(budget, lots=of_plain, into=plain_into)
        return self._quantised(stream, chosen, into)

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
        direct = [one for name, parts in wanted.items() if name not in self._places for one in parts]
        yield from self.plain.stream_slices(direct, host_budget_bytes, into=into)
        for name, array in self.stream(host_budget_bytes, names=wanted.keys() & self._places.keys()):
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
        for names in lots:
            yield from self._regions_of(names, wanted, host_budget_bytes)

    def _regions_of(
        self, names: Collection[str], wanted: Callable[[str], list[Region]], host_budget_bytes: int | None
    ) -> Iterator[tuple[str, list[np.ndarray]]]:
        direct = {name for name in names if name not in self._places}
        yield from self.plain.stream_regions([direct], wanted, host_budget_bytes)
        by_group: dict[str, set[str]] = {}
        for name in set(names) - direct:
            by_group.setdefault(self._places[name][0].group, set()).add(name)
        for group in by_group.values():
            parts = {name: wanted(name) for name in group}
            if not any(parts.values()):
                yield from ((name, []) for name in group)
                continue
            for name, array in self.stream(host_budget_bytes, names=group):
                for part in parts[name]:
                    part.take(array)
                yield name, [part.out for part in parts.pop(name)]

    def _quantised(
        self,
        stream: Iterator[tuple[str, np.ndarray]],
        chosen: Collection[str],
        into: Callable[[str], np.ndarray | None] | None,
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Plain tensors as they are, or quantised as soon as their group is complete."""
        groups = {self._places[name][0].group for name in chosen if name in self._places}
        waiting: dict[str, dict[str, np.ndarray]] = {}
        for name, array in stream:
            if name not in self._users:
                yield name, array
                continue
            for matrix in self._users[name]:
                if matrix.group not in groups:
                    continue
                held = waiting.setdefault(matrix.group, {})
                held[matrix.module] = _slice(matrix, array)
                if len(held) == len(self._groups[matrix.group]):
                    yield from self._finished(waiting.pop(matrix.group), matrix.group, chosen, into)
            del array

    def _finished(
        self,
        weights: dict[str, np.ndarray],
        group: str,
        chosen: Collection[str],
        into: Callable[[str], np.ndarray | None] | None,
    ) -> Iterator[tuple[str, np.ndarray]]:
        self._note_amax(group, weights.values())
        for module in list(weights):
            matrix = self.matrices[module]
            names = [f"{module}.{leaf}" for leaf in _scheme(bool(self.amax_of_inputs)).leaves.values()]
            places = {name: into(name) for name in names if name in chosen} if into else {}
            given = places.get(f"{module}.weight"), places.get(f"{module}.weight_scale")
            for leaf, array in self._parts(matrix, weights.pop(module), given).items():
                if (name := f"{module}.{leaf}") in chosen:
                    yield name, _put(array, places.get(name))

    def _note_amax(self, group: str, weights: Iterable[np.ndarray]) -> None:
        found = [_largest(weight) for weight in weights]
        if not np.isfinite(found).all():
            problems = [f"{group} cannot be quantised: its weights hold NaN or infinity, and NVFP4 has neither"]
            raise CheckpointError(self.source, problems)
        self._amax[group] = max(found)

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
        return _slice(matrix, self._kept[matrix.tensor])


def quantized(checkpoint: Checkpoint, amax_of_inputs: Mapping[str, float] | None = None) -> QuantizedCheckpoint:
    """The checkpoint with all its linear layers in NVFP4 but those that recipes leave alone.

    Left alone: embedding, head, routers, small gates, convolutions, the draft, and layers whose inputs are no multiple
    of 16.

    Args:
        checkpoint: not quantised.
        amax_of_inputs: module, as the result names it -> largest magnitude of its input. Given, inputs are quantised
            too; then every quantised module must be there.
    Raises:
        CheckpointError: it is quantised already, nothing can be quantised, or inputs are missing.
    """
    if checkpoint.config.quantization is not None:
        raise CheckpointError(checkpoint.source, ["it is quantised already. Load it without quantize."])
    matrices, left_alone = matrices_of(checkpoint)
    if not matrices:
        raise CheckpointError(
            checkpoint.source, [f"no linear layer has a multiple of {BLOCK} inputs: nothing to quantise"]
        )
    inputs = dict(amax_of_inputs or {})
    missing = [module for module in matrices if inputs and module not in inputs]
    if missing:
        raise CheckpointError(checkpoint.source, [f"the calibration saw no input of {module}" for module in missing])
    scheme = _scheme(bool(inputs))
    consumed = {matrix.tensor for matrix in matrices.values()}
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in consumed}
    for matrix in matrices.values():
        tensors |= infos(checkpoint, matrix, scheme)
    inside, beside = documents(scheme, sorted(left_alone))
    document = checkpoint.config_document | {KEY: inside}
    config, problems = config_from_json(document, beside=beside, found=tensors)
    if config is None:
        raise CheckpointError(checkpoint.source, problems)
    given = {one.name: getattr(checkpoint, one.name) for one in dataclasses.fields(Checkpoint)}
    given |= {"config": config, "tensors": tensors, "config_document": document, "quantization_document": beside}
    found = {"plain": checkpoint, "matrices": matrices, "left_alone": left_alone, "amax_of_inputs": inputs}
    return QuantizedCheckpoint(**given, **found)


def open_to_load(uri: str | os.PathLike[str], method: str | None) -> Checkpoint:
    """Open a checkpoint, seen through quantisation if ``method`` says so and it is not quantised itself.

    Raises:
        CheckpointError: as ``open_checkpoint`` and ``quantized``; or it is quantised in another way, so that what is
            quantised later could never be its successor.
        ValueError: another method than ``"nvfp4"``.
    """
    if method not in (None, "nvfp4"):
        raise ValueError(f"quantize={method!r} is not implemented, expected 'nvfp4' or None")
    checkpoint = open_checkpoint(uri)
    quantization = checkpoint.config.quantization
    if method is None:
        return checkpoint
    if quantization is None:
        return quantized(checkpoint)
    others = {str(scheme) for _, scheme in quantization.schemes if scheme != _scheme(False)}
    others |= {"an FP8 cache"} if quantization.kv_cache is not None else set()
    if others:
        found = f"it is quantised already, and not as quantize={method!r} would: {', '.join(sorted(others))}"
        raise CheckpointError(
            checkpoint.source, [f"{found}. What is quantised while it is read has scales of weights only"]
        )
    return checkpoint


def _scheme(activations: bool) -> Scheme:
    return Scheme("nvfp4", activations=activations)


def _slice(matrix: Matrix, array: np.ndarray) -> np.ndarray:
    if matrix.rows is None:
        return array
    expert = array[matrix.expert]
    return np.ascontiguousarray(expert.T[matrix.rows]) if matrix.is_transposed else expert[matrix.rows]


def _largest(weight: np.ndarray) -> float:
    """The largest magnitude. Those of floats are in order as integers too, NaN last, and those NumPy is quick on."""
    unsigned = np.dtype(f"u{weight.itemsize}")
    magnitude = weight.view(unsigned) & unsigned.type(np.iinfo(unsigned).max >> 1)
    return float(np.max(magnitude, initial=0).astype(unsigned).view(weight.dtype))


def _put(array: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    if out is None or out is array:
        return array
    out[...] = array
    return out
