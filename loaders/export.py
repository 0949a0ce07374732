"""Parameters -> the checkpoint they came from: the rule table read backwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path

import numpy as np

from loaders.checkpoint import Checkpoint
from loaders.spec import Specs
from loaders.writer import write_checkpoint


class _Reader:
    """Checkpoint tensors out of parameters.

    Keeps the last two parameters: files hold experts one by one, each with its part of both stacks of the layer.
    """

    def __init__(self, checkpoint: Checkpoint, specs: Specs, read_param: Callable[[str], np.ndarray]) -> None:
        self.places = {source.tensor: (spec.name, source.index) for spec in specs for source in spec.sources}
        shipped = {tied.tensor: tied.same_as for tied in specs.tied if tied.tensor in checkpoint.tensors}
        self.places |= {tensor: (same_as, ()) for tensor, same_as in shipped.items()}
        self._read_param = read_param
        self._kept: dict[str, np.ndarray] = {}

    def __call__(self, tensor: str) -> np.ndarray:
        name, index = self.places[tensor]
        if name not in self._kept:
            self._kept = dict(list(self._kept.items())[-1:]) | {name: self._read_param(name)}
        return self._kept[name][index]


def tensors_of(
    checkpoint: Checkpoint, specs: Specs, read_param: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Every checkpoint tensor a model holds, by name, as its parameters stand now.

    Args:
        checkpoint: what the model was last loaded from; says whether a redundant tied tensor is part of it.
        specs: of the model's stage.
        read_param: a parameter by name, on the host, in its stored dtype.
    """
    reader = _Reader(checkpoint, specs, read_param)
    for name in reader.places:
        yield name, reader(name)


def export_checkpoint(
    directory: str | PathLike[str], checkpoint: Checkpoint, specs: Specs, read_param: Callable[[str], np.ndarray]
) -> Path:
    """Write the tensors a model holds as a checkpoint laid out like the one it came from.

    A pipeline stage writes its own tensors only. All or nothing; an existing non-empty directory is refused.

    Raises:
        FileExistsError: the directory holds something already.
    """
    reader = _Reader(checkpoint, specs, read_param)
    held = {name: info for name, info in checkpoint.tensors.items() if name in reader.places}
    return write_checkpoint(
        directory,
        held,
        reader,
        config=checkpoint.config_document,
        generation=checkpoint.generation_document or None,
        files={name: info.file for name, info in held.items()},
    )
