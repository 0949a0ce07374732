"""Checkpoints broken on purpose, in one way or in several: what a reload must refuse, naming all of it, without harm.

Three kinds, by when a loader can notice: opening the files, matching them against the live model, reading the bytes.
Faults of the first two kinds can be combined with others of their kind; every one must be named by the error.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loaders.checkpoint import Checkpoint
from loaders.errors import CheckpointError
from loaders.files.header import TensorInfo
from loaders.files.opening import CONFIG
from loaders.reading.plan import specs_of
from loaders.spec import Placement, Specs
from loaders.stage import Stage
from loaders.writing.writer import PlannedTensor, TensorType, write_checkpoint
from parity.zoo import ZOO, zoo_config

Delivered = Iterator[tuple[str, np.ndarray]]
Delivery = Callable[[Checkpoint, Delivered], Delivered]


@dataclass
class Draft:
    """A checkpoint about to be written with faults in it.

    Attributes:
        checkpoint: the good one it is made from.
        config: config.json to write.
        tensors: name -> type and how to get it, in the order to write.
        afterwards: what to do to the written directory.
        deliveries: what to do to every stream of it.
        told: what the error must name.
        victims: tensors no fault has touched yet, those of a stack first.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    tensors: dict[str, tuple[PlannedTensor, Callable[[], np.ndarray]]]
    victims: list[Placement]
    afterwards: list[Callable[[Path], None]] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def victim(self, *, in_a_stack: bool) -> str:
        """A tensor for one fault alone; out of a stack where the model has any and ``in_a_stack``."""
        return self.victims.pop(0 if in_a_stack else -1).tensor


def _draft(checkpoint: Checkpoint) -> Draft:
    placements = [placement for spec in _specs(checkpoint) for placement in spec.placements]
    victims = sorted(placements, key=lambda placement: -len(placement.index))
    tensors: dict[str, tuple[PlannedTensor, Callable[[], np.ndarray]]] = {
        name: (info, partial(checkpoint.read, name)) for name, info in checkpoint.tensors.items()
    }
    return Draft(checkpoint, copy.deepcopy(checkpoint.config_document), tensors, victims)


def _specs(checkpoint: Checkpoint) -> Specs:
    """What a model without its draft reads, by the names this checkpoint has for it."""
    return specs_of(checkpoint.config, Stage(), checkpoint.tensors)


# Seen when the files are opened.


def truncated_file(draft: Draft) -> None:
    def cut(directory: Path) -> None:
        path = _files(directory)[0]
        os.truncate(path, path.stat().st_size - 8)
        draft.told.append(path.name)

    draft.afterwards.append(cut)


def missing_file(draft: Draft) -> None:
    def remove(directory: Path) -> None:
        path = _files(directory)[-1]
        path.unlink()
        draft.told.append(path.name)

    draft.afterwards.append(remove)


def broken_header(draft: Draft) -> None:
    def spoil(directory: Path) -> None:
        path = _files(directory)[1]
        with open(path, "r+b") as file:
            file.seek(8)
            file.write(b"!")
        draft.told.append(path.name)

    draft.afterwards.append(spoil)


def broken_config(draft: Draft) -> None:
    draft.afterwards.append(lambda directory: (directory / CONFIG).unlink())
    draft.told.append(CONFIG)


# Seen when the tensors are matched against the live model.


def renamed_tensor(draft: Draft) -> None:
    name = draft.victim(in_a_stack=True)
    draft.tensors[f"{name}_renamed"] = draft.tensors.pop(name)
    draft.told += [f"{name!r} is missing", f"{name}_renamed"]


def missing_tensor(draft: Draft) -> None:
    name = draft.victim(in_a_stack=False)
    del draft.tensors[name]
    draft.told.append(f"{name!r} is missing")


def extra_tensor(draft: Draft) -> None:
    draft.tensors["model.surplus.weight"] = (TensorType("F32", (3,)), lambda: np.ones(3, np.float32))
    draft.told.append("model.surplus.weight")


def wrong_shape(draft: Draft) -> None:
    name = draft.victim(in_a_stack=True)
    info, read = draft.tensors[name]
    draft.tensors[name] = (TensorType(info.dtype, (*info.shape, 1)), lambda: read()[..., None])
    draft.told.append(f"{name!r} has shape")


def wrong_dtype(draft: Draft) -> None:
    name = draft.victim(in_a_stack=False)
    info, read = draft.tensors[name]
    dtype, numpy_dtype = ("F32", np.float32) if info.dtype == "F16" else ("F16", np.float16)
    draft.tensors[name] = (TensorType(dtype, info.shape), lambda: read().astype(np.float32).astype(numpy_dtype))
    draft.told.append(f"{name!r} is {dtype}")


def other_config(draft: Draft) -> None:
    text = draft.config.get("text_config", draft.config)  # of the model inside a wrapper
    text["rms_norm_eps"] *= 2
    draft.told.append("rms_norm_eps")


def other_architecture(draft: Draft) -> None:
    ours = draft.checkpoint.config.architecture
    draft.config = zoo_config(next(name for name, model in ZOO.items() if model.architecture != ours))
    draft.told.append("architecture")


# Seen when the bytes are read.


def _half(checkpoint: Checkpoint) -> tuple[str, TensorInfo]:
    """The tensor that stands half-way; a load may stream all of them at once or in lots. A wrapper's others are not."""
    wanted = _specs(checkpoint).tensors()
    streamed = [(name, info) for name, info in checkpoint.tensors.items() if name in wanted]
    return streamed[len(streamed) // 2]


def unreadable_half_way(draft: Draft) -> None:
    def fail(checkpoint: Checkpoint, delivered: Delivered) -> Delivered:
        half, _ = _half(checkpoint)
        for item in delivered:
            if item[0] == half:
                raise CheckpointError(checkpoint.source, ["injected: the disk went away"])
            yield item

    draft.deliveries.append(fail)
    draft.told.append("injected")


def truncated_after_opening(draft: Draft) -> None:
    def cut(checkpoint: Checkpoint, delivered: Delivered) -> Delivered:
        _, info = _half(checkpoint)
        path = Path(str(checkpoint.source)) / info.file
        os.truncate(path, info.offsets[0])
        draft.told.append(path.name)
        return delivered

    draft.deliveries.append(cut)


def delivered_twice(draft: Draft) -> None:
    def repeat(checkpoint: Checkpoint, delivered: Delivered) -> Delivered:
        half, _ = _half(checkpoint)
        for item in delivered:
            yield item
            if item[0] == half:
                yield item

    draft.deliveries.append(repeat)
    draft.told.append("was delivered twice")


def never_delivered(draft: Draft) -> None:
    name = draft.victim(in_a_stack=True)
    draft.deliveries.append(lambda _, delivered: (item for item in delivered if item[0] != name))
    draft.told.append(f"{name!r} was never delivered")


def delivered_unasked(draft: Draft) -> None:
    def add(checkpoint: Checkpoint, delivered: Delivered) -> Delivered:
        yield from delivered
        yield "model.surplus.weight", np.ones(3, np.float32)

    draft.deliveries.append(add)
    draft.told.append("delivered but not asked for")


def delivered_in_another_shape(draft: Draft) -> None:
    name = draft.victim(in_a_stack=True)
    draft.deliveries.append(lambda _, delivered: ((n, x[..., None] if n == name else x) for n, x in delivered))
    draft.told.append("expected")


Fault = Callable[[Draft], None]
OPENING: tuple[Fault, ...] = (truncated_file, missing_file, broken_header, broken_config)
MATCHING: tuple[Fault, ...] = (
    renamed_tensor,
    missing_tensor,
    extra_tensor,
    wrong_shape,
    wrong_dtype,
    other_config,
    other_architecture,
)
READING: tuple[Fault, ...] = (
    unreadable_half_way,
    truncated_after_opening,
    delivered_twice,
    never_delivered,
    delivered_unasked,
    delivered_in_another_shape,
)
FAULTS: Mapping[str, Fault] = {fault.__name__.replace("_", " "): fault for fault in (*OPENING, *MATCHING, *READING)}


@contextlib.contextmanager
def broken_checkpoint(good: Checkpoint, scratch: Path, *faults: Fault) -> Iterator[tuple[Path, list[str]]]:
    """A copy of ``good`` with ``faults`` in it, and what the error must name (complete once the reload has failed).

    It is written in several files, so that one can be missing or break off half-way, and removed afterwards.
    """
    draft = _draft(good)
    for fault in faults:
        fault(draft)
    root = Path(tempfile.mkdtemp(prefix="broken-", dir=scratch))
    try:
        directory = write_checkpoint(
            root / "checkpoint",
            {name: info for name, (info, _) in draft.tensors.items()},
            lambda name: draft.tensors[name][1](),
            config=draft.config,
            generation=good.generation_document or None,
            max_file_bytes=max(1, good.num_bytes // 4),
        )
        for spoil in draft.afterwards:
            spoil(directory)
        with changed_deliveries(*draft.deliveries):
            yield directory, draft.told
    finally:
        shutil.rmtree(root)


@contextlib.contextmanager
def changed_deliveries(*changes: Delivery) -> Iterator[None]:
    """Fault injection: inside, whatever any checkpoint streams passes through ``changes``."""
    original = Checkpoint.stream

    def stream(
        self: Checkpoint, host_budget_bytes: int | None = None, **options: Any
    ) -> Generator[tuple[str, np.ndarray]]:
        delivered = original(self, host_budget_bytes, **options)
        for change in changes:
            delivered = change(self, delivered)
        yield from delivered

    Checkpoint.stream = stream
    try:
        yield
    finally:
        Checkpoint.stream = original


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))
