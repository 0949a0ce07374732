"""Parameters -> the checkpoint they came from: the rule table read backwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from os import PathLike
from pathlib import Path

import numpy as np

from loaders.checkpoint import DEFAULT_BUDGET_BYTES, Checkpoint
from loaders.files.header import TensorInfo
from loaders.reading.memory import bits
from loaders.reading.place import place_of
from loaders.reading.plan import as_stored
from loaders.spec import Placement, Specs
from loaders.writing.new_directory import new_directory
from loaders.writing.writer import write_checkpoint, writing_order


class TensorReader:
    """Every checkpoint tensor a model holds, as its parameters stand now: called one by name, iterated (name, tensor).

    Keeps the last two parameters: files hold experts one by one, each with its part of both stacks of the layer.

    Args:
        checkpoint: what the model was last loaded from; says whether a redundant tied tensor is part of it.
        specs: of the model's stage.
        read_param: a parameter by name, on the host, in its stored dtype.
    """

    def __init__(self, checkpoint: Checkpoint, specs: Specs, read_param: Callable[[str], np.ndarray]) -> None:
        by_name = {spec.name: spec for spec in specs}
        self.places = {
            placement.tensor: (as_stored(spec, checkpoint.tensors[placement.tensor].shape), placement)
            for spec in specs
            for placement in spec.placements
        }
        shipped = [tied for tied in specs.tied if tied.tensor in checkpoint.tensors]
        self.places |= {tied.tensor: (by_name[tied.same_as], Placement(tied.same_as)) for tied in shipped}
        self._read_param = read_param
        self._kept: dict[str, np.ndarray] = {}

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        return ((tensor, self(tensor)) for tensor in self.places)

    def asked_for(self, tensors: Iterable[str]) -> list[str]:
        """Parameters that reading these tensors, one after the other from now on, will ask for, in that order."""
        kept, asked = list(self._kept), []
        for name in (self.places[tensor][0].name for tensor in tensors):
            if name not in kept:
                kept = [*kept[-1:], name]
                asked.append(name)
        return asked

    def __call__(self, tensor: str) -> np.ndarray:
        spec, placement = self.places[tensor]
        if spec.name not in self._kept:
            self._kept = dict(list(self._kept.items())[-1:]) | {spec.name: self._read_param(spec.name)}
        place = place_of(self._kept[spec.name], spec, placement)
        return np.ascontiguousarray(bits(place)).view(place.dtype) if spec.is_transposed else place


def export_checkpoint(
    directory: str | PathLike[str],
    checkpoint: Checkpoint,
    specs: Specs,
    read_param: Callable[[str], np.ndarray],
    left_out: Collection[str] = (),
    *,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Write the tensors a model holds as a checkpoint laid out like the one it came from.

    A pipeline stage writes its own tensors only. All or nothing; an existing non-empty directory is refused.

    Args:
        directory: new or empty.
        checkpoint: what the model was last loaded from.
        specs: of the model's stage.
        read_param: a parameter by name, on the host, in its stored dtype.
        left_out: tensors the model never loaded, to be copied from ``checkpoint`` so that the export is whole.
        check: as for ``write_checkpoint``.
    Raises:
        FileExistsError: the directory holds something already.
        ValueError: it is an address.
        CheckpointError: a left out tensor can no longer be read.
    """
    reader = TensorReader(checkpoint, specs, read_param)
    copied = frozenset(left_out)
    held = _held(checkpoint, reader, copied)
    files = {name: info.file for name, info in held.items()}
    with _read_in_turn(checkpoint, [name for name in writing_order(held, files) if name in copied]) as copy:
        return write_checkpoint(
            directory,
            held,
            lambda name: copy(name) if name in copied else reader(name),
            config=checkpoint.config_document,
            generation=checkpoint.generation_document or None,
            quantization=checkpoint.quantization_document or None,
            metadata={name: checkpoint.metadata[name] for name in set(files.values())},
            files=files,
            check=check,
        )


def export_together(
    directory: str | PathLike[str],
    checkpoint: Checkpoint,
    specs: Specs,
    read_param: Callable[[str], np.ndarray],
    left_out: Collection[str] = (),
    *,
    is_writer: bool,
    together: Callable[[Callable[[], object]], object],
) -> Path:
    """``export_checkpoint`` of a model that several processes hold: one writes, the others hand it their parts.

    Args:
        directory: new or empty, where the one writes.
        checkpoint: as there.
        specs: as there.
        read_param: as there; all processes call it for the same parameters in the same order.
        left_out: as there.
        is_writer: whether it is this process that writes.
        together: does what it is given; an error of one process is one of all.
    """
    together(lambda: new_directory(directory) if is_writer else None)
    reader = TensorReader(checkpoint, specs, read_param)
    copied = frozenset(left_out)
    held = _held(checkpoint, reader, copied)
    order = writing_order(held, {name: info.file for name, info in held.items()})
    waiting = deque(reader.asked_for(name for name in order if name not in copied))

    def read_in_turn(name: str) -> np.ndarray:
        assert waiting.popleft() == name, f"{name} is asked for out of turn"
        return read_param(name)

    def write() -> None:
        try:
            if is_writer:
                export_checkpoint(directory, checkpoint, specs, read_in_turn, left_out)
        finally:  # whatever became of the writing, nobody may wait for ever
            while waiting:
                read_in_turn(waiting[0])

    together(write)
    return Path(directory)


@contextmanager
def _read_in_turn(checkpoint: Checkpoint, names: list[str]) -> Iterator[Callable[[str], np.ndarray]]:
    """What reads these tensors, which have to be asked for in this order: all are one stream.

    One by one, a store would be asked about a file for each of its tensors.
    """
    waiting: dict[str, np.ndarray] = {}
    with closing(checkpoint.stream(lots=_lots_in_turn(checkpoint, names))) as stream:

        def read(name: str) -> np.ndarray:
            while name not in waiting:
                waiting.update([next(stream)])
            return waiting.pop(name)

        yield read


def _lots_in_turn(checkpoint: Checkpoint, names: list[str]) -> list[list[str]]:
    """In this order, as many in a lot as may wait until they are asked for."""
    lots: list[list[str]] = []
    room = 0
    for name in names:
        room -= (num_bytes := checkpoint.tensors[name].num_bytes)
        if room < 0:
            lots.append([])
            room = DEFAULT_BUDGET_BYTES - num_bytes
        lots[-1].append(name)
    return lots


def _held(checkpoint: Checkpoint, reader: TensorReader, copied: frozenset[str]) -> dict[str, TensorInfo]:
    return {name: info for name, info in checkpoint.tensors.items() if name in reader.places or name in copied}
