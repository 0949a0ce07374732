"""A checkpoint as a save remembers it: all but the bytes, which are looked for where they were."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from loaders.checkpoint import Checkpoint
from loaders.config import config_from_json
from loaders.errors import CheckpointError
from loaders.files.header import TensorInfo
from loaders.files.parallel import PinnedFiles
from loaders.quantization.quantize import quantized
from loaders.quantization.quantized import QuantizedCheckpoint
from loaders.sources import Identity, OpenFile, Session, Source, open_source
from loaders.sources.positioned import FileIdentity
from loaders.sources.source import Result


@dataclass(frozen=True, eq=False)
class RememberedIdentity:
    """Of an object in a store, as it was: equal to that of an object which still is so."""

    text: str
    num_bytes: int

    def __eq__(self, other: object) -> bool:
        return (repr(other) == self.text) if not isinstance(other, RememberedIdentity) else self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@dataclass(frozen=True)
class RememberedSource:
    """The address a model was loaded from. Nothing is looked for there before a file is opened."""

    address: str

    def __str__(self) -> str:
        return self.address

    @property
    def absolute(self) -> str:
        return self.address

    def __fspath__(self) -> str:
        return self.absolute

    @cached_property
    def _there(self) -> Source:
        return open_source(self.address)

    @property
    def gap_bytes(self) -> int:
        return self._there.gap_bytes

    @property
    def is_dear_to_ask(self) -> bool:
        return self._there.is_dear_to_ask

    def names(self) -> list[str]:
        return self._there.names()

    def open(self, name: str, known: Identity | None = None) -> OpenFile:
        """See ``Source.open``; of an object only a text is remembered, so the store is asked all the same."""
        return self._there.open(name)

    def identity(self, name: str) -> Identity:
        return self._there.identity(name)

    def read_file(self, name: str) -> bytes:
        return self._there.read_file(name)

    def in_parallel(self, work: Callable[[str], Result], names: Collection[str]) -> Iterator[Result]:
        return self._there.in_parallel(work, names)

    def session(self, total_bytes: int) -> Session:
        return self._there.session(total_bytes)

    def is_current(self, session: Session) -> bool:
        return self._there.is_current(session)


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is to be remembered of a checkpoint, as JSON."""
    if isinstance(checkpoint, QuantizedCheckpoint):
        return {"quantized": described(checkpoint.plain)}
    return {
        "address": checkpoint.source.absolute,
        "config": checkpoint.config_document,
        "generation": checkpoint.generation_document,
        "quantization": checkpoint.quantization_document,
        "metadata": checkpoint.metadata,
        "tensors": {name: asdict(info) for name, info in checkpoint.tensors.items()},
        "identities": {file: _as_json(found) for file, found in checkpoint.files.identities.items()},
    }


def remembered(document: dict[str, Any]) -> Checkpoint:
    """The checkpoint that ``described`` described; its files are opened when a tensor is read, which must be as it was.

    Raises:
        CheckpointError: config.json can no longer be understood.
    """
    if "quantized" in document:
        return quantized(remembered(document["quantized"]))
    tensors = {
        name: TensorInfo(found["dtype"], tuple(found["shape"]), found["file"], tuple(found["offsets"]))
        for name, found in document["tensors"].items()
    }
    source = RememberedSource(document["address"])
    config, problems = config_from_json(document["config"], beside=document["quantization"] or None, found=tensors)
    if config is None or problems:
        raise CheckpointError(source, problems)
    identities = {file: _from_json(found) for file, found in document["identities"].items()}
    return Checkpoint(
        config=config,
        tensors=tensors,
        config_document=document["config"],
        generation_document=document["generation"],
        quantization_document=document["quantization"],
        metadata=document["metadata"],
        files=PinnedFiles(source, identities),
        documents=PinnedFiles(source, {}),
    )


def _as_json(identity: Identity) -> dict[str, Any]:
    if isinstance(identity, FileIdentity | RememberedIdentity):
        return asdict(identity)
    return {"text": repr(identity), "num_bytes": identity.num_bytes}


def _from_json(found: dict[str, Any]) -> Identity:
    return RememberedIdentity(**found) if "text" in found else FileIdentity(**found)
