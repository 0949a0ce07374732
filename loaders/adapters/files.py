"""The files of an adapter directory: one JSON document and one safetensors file. Pickle is never read."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loaders import dtypes
from loaders.errors import CheckpointError, reason
from loaders.files.header import TensorInfo, read_header
from loaders.files.parallel import PinnedFiles
from loaders.files.strict_json import BadJson, parse_object
from loaders.sources import Identity, Source, open_source, small_file

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BLOCK_BYTES, BLOCKS_KEPT = 8 << 20, 8  # of the weights: hundreds of small tensors are not hundreds of requests


@dataclass
class AdapterFiles:
    """What is in the directory; ``read`` gives one tensor. Small ones come in blocks, of which the last few are kept.

    Attributes:
        files: as they were when they were opened.
        document: adapter_config.json; None: it could not be read.
        tensors: of the header of the weights.
    """

    files: PinnedFiles
    document: dict[str, Any] | None
    tensors: dict[str, TensorInfo]
    _blocks: dict[int, bytes] = field(default_factory=dict, repr=False)

    @property
    def source(self) -> Source:
        """The directory."""
        return self.files.source

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its own dtype.

        Raises:
            CheckpointError: the file is gone, is known to have changed since it was opened, or cannot be read.
        """
        info = self.tensors[name]
        out = np.empty(dtypes.stored_shape(info.dtype, info.shape), dtypes.to_numpy(info.dtype))
        place, (start, end) = out.reshape(-1).view(np.uint8), info.offsets
        try:
            if len(place) > BLOCK_BYTES:
                with self.files.open(WEIGHTS) as file:
                    file.read_into(place.data, start)
                return out
            for index in range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
                first = index * BLOCK_BYTES
                part = memoryview(self._block(index))[max(start - first, 0) : end - first]
                at = max(first - start, 0)
                place[at : at + len(part)] = np.frombuffer(part, np.uint8)
        except OSError as error:
            where = f"tensor {name!r} of {info.file}"
            raise CheckpointError(self.source, [f"{where} cannot be read: {reason(error)}"]) from error
        return out

    def _block(self, index: int) -> bytes:
        block = self._blocks.pop(index, None)
        if block is None:
            with self.files.open(WEIGHTS) as file:
                start = index * BLOCK_BYTES
                block = file.read(start, min(BLOCK_BYTES, file.opened.num_bytes - start))
            if len(self._blocks) == BLOCKS_KEPT:
                del self._blocks[next(iter(self._blocks))]  # asked for longest ago
        self._blocks[index] = block  # the last again
        return block


def open_adapter_files(uri: str | os.PathLike[str]) -> tuple[AdapterFiles, list[str]]:
    """The directory, its document and header, and what is wrong with them.

    Raises:
        CheckpointError: there is no such directory.
    """
    try:
        source = open_source(uri)
        present = source.names()
    except OSError as error:
        raise CheckpointError(uri, [f"cannot be opened: {reason(error)}"]) from error
    identities: dict[str, Identity] = {}
    document, of_document = _read_document(source, present, identities)
    tensors, of_weights = _read_tensors(source, present, identities)
    files = PinnedFiles(source, identities, "the adapter")
    return AdapterFiles(files, document, tensors), of_document + of_weights


def _read_document(
    source: Source, present: list[str], identities: dict[str, Identity]
) -> tuple[dict[str, Any] | None, list[str]]:
    try:
        with source.open(CONFIG) as file:
            identities[CONFIG] = file.opened
            return parse_object(small_file(file, file.opened.num_bytes)), []
    except BadJson as error:
        return None, [f"{CONFIG} {error}"]
    except OSError as error:
        hint = "" if CONFIG in present else ". Is this a PEFT adapter?"
        return None, [f"{CONFIG} cannot be read: {reason(error)}{hint}"]


def _read_tensors(
    source: Source, present: list[str], identities: dict[str, Identity]
) -> tuple[dict[str, TensorInfo], list[str]]:
    if WEIGHTS not in present:
        found = f" {PICKLE} is there, but it is a pickle, which can run any code and is never read."
        pickle = found if PICKLE in present else ""
        return {}, [f"{WEIGHTS} is missing.{pickle} Save the adapter as safetensors."]
    try:
        with source.open(WEIGHTS) as file:
            identities[WEIGHTS] = file.opened
            header, problems = read_header(file)
    except OSError as error:
        return {}, [f"{WEIGHTS} cannot be opened: {reason(error)}"]
    return header.tensors if header else {}, problems
