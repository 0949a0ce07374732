"""The files of an adapter directory: one JSON document and one safetensors file. Pickle is never read."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loaders import dtypes
from loaders.errors import CheckpointError
from loaders.files import check_files
from loaders.header import TensorInfo, read_header
from loaders.sources import Identity, OpenFile, Source, open_source, small_file
from loaders.strict_json import BadJson, parse_object

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BLOCK_BYTES, BLOCKS_KEPT = 8 << 20, 8  # of the weights: hundreds of small tensors are not hundreds of requests


@dataclass
class AdapterFiles:
    """What is in the directory; ``read`` gives one tensor. Small ones come in blocks, of which the last few are kept.

    Attributes:
        source: the directory.
        document: adapter_config.json; None: it could not be read.
        tensors: of the header of the weights.
        identities: file -> what it was when it was opened.
    """

    source: Source
    document: dict[str, Any] | None = None
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    identities: dict[str, Identity] = field(default_factory=dict)
    _blocks: dict[int, bytes] = field(default_factory=dict, repr=False)

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
                with self._opened() as file:
                    file.read_into(place.data, start)
                return out
            for index in range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
                first = index * BLOCK_BYTES
                part = memoryview(self._block(index))[max(start - first, 0) : end - first]
                at = max(first - start, 0)
                place[at : at + len(part)] = np.frombuffer(part, np.uint8)
        except OSError as error:
            where = f"tensor {name!r} of {info.file}"
            raise CheckpointError(self.source, [f"{where} cannot be read: {error.strerror or error}"]) from error
        return out

    def _block(self, index: int) -> bytes:
        block = self._blocks.pop(index, None)
        if block is None:
            with self._opened() as file:
                start = index * BLOCK_BYTES
                block = file.read(start, min(BLOCK_BYTES, file.opened.num_bytes - start))
            if len(self._blocks) == BLOCKS_KEPT:
                del self._blocks[next(iter(self._blocks))]  # asked for longest ago
        self._blocks[index] = block  # the last again
        return block

    def _opened(self) -> OpenFile:
        """The weights, as far as is known without asking. Raises OSError."""
        known = self.identities[WEIGHTS]
        file = self.source.open(WEIGHTS, known)
        if file.opened != known:
            file.close()
            raise OSError("it changed since it was opened")
        return file

    def check(self) -> None:
        """See that the files are as they were opened. Raises CheckpointError with all that are not."""
        check_files(self.source, self.identities, "it")


def open_adapter_files(uri: str | os.PathLike[str]) -> tuple[AdapterFiles, list[str]]:
    """The directory, its document and header, and what is wrong with them.

    Raises:
        CheckpointError: there is no such directory.
    """
    try:
        source = open_source(uri)
        present = source.names()
    except OSError as error:
        raise CheckpointError(uri, [f"cannot be opened: {error.strerror or error}"]) from error
    files, problems = AdapterFiles(source), []
    try:
        with source.open(CONFIG) as file:
            files.identities[CONFIG] = file.opened
            files.document = parse_object(small_file(file, file.opened.num_bytes))
    except BadJson as error:
        problems.append(f"{CONFIG} {error}")
    except OSError as error:
        hint = "" if CONFIG in present else ". Is this a PEFT adapter?"
        problems.append(f"{CONFIG} cannot be read: {error.strerror or error}{hint}")
    if WEIGHTS not in present:
        pickle = (
            f" {PICKLE} is there, but it is a pickle, which can run any code and is never read."
            if PICKLE in present
            else ""
        )
        problems.append(f"{WEIGHTS} is missing.{pickle} Save the adapter as safetensors.")
        return files, problems
    try:
        with source.open(WEIGHTS) as file:
            files.identities[WEIGHTS] = file.opened
            header, found = read_header(file)
    except OSError as error:
        return files, [*problems, f"{WEIGHTS} cannot be opened: {error.strerror or error}"]
    files.tensors = header.tensors if header else {}
    return files, problems + found
