"""Mutants of fused experts and of streaming: layouts, ids, counts, and buffers that are only lent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from loaders import CheckpointError
from loaders.writing.writer import TensorType
from parity.mutants import Mutant, Patch
from parity.mutants.bench import Detector
from parity.mutants.expert_bench import expert_counts, expert_forms
from parity.mutants.plants import BOTH, HYBRID_MOE, wrapped


def _one_by_one(chosen: Any, by_form: dict[str, Any], *args: Any) -> dict[str, Any]:
    return {name: chosen({name: forms}, *args)[name] for name, forms in by_form.items()}


def _shapeless(chosen: Any, by_form: dict[str, Any], found: Any, *args: Any) -> dict[str, Any]:
    return chosen(by_form, dict.fromkeys(found, TensorType("BF16", ())), *args)


def _halves_swapped(write: Any, self: Any, param: Any, spec: Any, source: Any, array: Any) -> None:
    write(self, param, spec, source, array)
    if spec.axes[:2] == ("E", "2") and not source.index:
        param[...] = param[:, ::-1].copy()


def _not_turned(place_of: Any, param: Any, spec: Any, source: Any) -> Any:
    return param.reshape(spec.tensor_shape) if spec.is_transposed else place_of(param, spec, source)


def _expert_zero(original: Any, backend: str) -> Any:
    return property(lambda self: tuple(0 if i == self.expert_id else i for i in original.fget(self)))


def _kept_past_its_step() -> list[Patch]:
    """A piece is put into its place when the next one comes, as asynchronous copies are."""

    def make(original: Any, backend: str) -> Any:
        kept: list[tuple[Any, Any]] = []

        def late(piece: Any, raw: Any) -> None:
            for one in kept:
                original(*one)
            kept[:] = [(piece, raw)]

        return late

    return [Patch("loaders.reading.regions:Piece.take", make)]


def _only_once(begin: Any, self: Any) -> None:
    if "_seen" not in vars(self):
        begin(self)


def _none(*_: Any, **__: Any) -> list[str]:
    return []


def _offset_lost(loader: Any, param: Any, weight: Any, *, expert_id: int, experts: Any, **options: Any) -> Any:
    return loader(param, weight, expert_id=expert_id % len(param), **options)


def _of(
    name: str, plant: Callable[[], Sequence[Patch]], says: str, detector: Detector = expert_forms, **more: Any
) -> Mutant:
    return Mutant(name, "loader", says, "issue 5", plant, HYBRID_MOE, detector, **more)


def _counted(name: str, plant: Callable[[], Sequence[Patch]], says: str) -> Mutant:
    return _of(name, plant, says, expert_counts)


EXPERT_MUTANTS: list[Mutant] = [
    _of(
        "experts_turned_one_by_one",
        wrapped("loaders.expand:_chosen", _one_by_one),
        "where gate_up fits both ways, it is read one way and down the other",
        backends=BOTH,
    ),
    _of(
        "experts_turned_by_family",
        wrapped("loaders.expand:_chosen", _shapeless),
        "the family alone says which way round experts are",
        refusal=CheckpointError,
    ),
    _of(
        "experts_read_as_if_turned",
        wrapped("loaders.reading.whole:place_of", _not_turned),
        "transposed experts are taken for what their bytes are not",
        backends=BOTH,
    ),
    _of(
        "expert_halves_swapped",
        wrapped("loaders.reading.filling:Filling.write", _halves_swapped),
        "up is written before gate",
        backends=BOTH,
    ),
    _of(
        "expert_ids_lost",
        lambda: [Patch("loaders.spec:Placement.index", _expert_zero)],
        "every expert is written to the first one's place",
        backends=BOTH,
    ),
    _of(
        "borrowed_piece_kept",
        _kept_past_its_step,
        "a borrowed buffer is read after the step it was lent for",
        backends=BOTH,
    ),
    _counted(
        "repeated_expert_unnoticed", wrapped("loaders.reading.plan:repeated_parts", _none), "a repeated expert passes"
    ),
    _counted(
        "missing_expert_unnoticed", wrapped("loaders.reading.plan:missing_parts", _none), "a missing expert passes"
    ),
    _counted(
        "expert_counters_not_reset",
        wrapped("loaders.reading.filling:Filling._begin", _only_once),
        "a second load goes on counting where the first ended",
    ),
    _counted(
        "rank_offset_lost",
        wrapped("loaders.reading.place:weight_loader", _offset_lost),
        "a rank writes experts that others hold",
    ),
]
