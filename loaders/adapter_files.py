"""The files of an adapter directory: one JSON document and one safetensors file. Pickle is never read."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loaders import dtypes
from loaders.errors import CheckpointError
from loaders.header import TensorInfo, read_header
from loaders.sources import Identity, OpenFile, Source, open_source
from loaders.strict_json import BadJson, parse_object

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@dataclass
class AdapterFiles:
    """What is in the directory; ``read`` gives one tensor.

    Attributes:
        source: the directory.
        document: adapter_config.json; None: it could not be read.
        tensors: of the header of the weights.
    """

    source: Source
    document: dict[str, Any] | None = None
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    identity: Identity | None = None

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its own dtype.

        Raises:
            CheckpointError: the file is gone, changed since it was opened, or cannot be read.
        """
        info = self.tensors[name]
        out = np.empty(dtypes.stored_shape(info.dtype, info.shape), dtypes.to_numpy(info.dtype))
        start, end = info.offsets
        try:
            with self.source.open(info.file) as file:
                self._check(file)
                if end > start:
                    file.read_into(out.reshape(-1).view(np.uint8).data, start)
                if file.is_cheap_to_identify:  # else what is read is of the object that was asked about
                    self._check(file)
        except OSError as error:
            where = f"tensor {name!r} of {info.file}"
            raise CheckpointError(self.source, [f"{where} cannot be read: {error.strerror or error}"]) from error
        return out

    def _check(self, file: OpenFile) -> None:
        if file.identity() != self.identity:
            raise CheckpointError(self.source, [f"{file.name} changed since it was opened. Open it again."])


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
        files.document = parse_object(source.read_file(CONFIG))
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
            files.identity = file.identity()
            header, found = read_header(file)
    except OSError as error:
        return files, [*problems, f"{WEIGHTS} cannot be opened: {error.strerror or error}"]
    files.tensors = header.tensors if header else {}
    return files, problems + found
