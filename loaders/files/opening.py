"""A checkpoint is opened: config, index and headers are read and validated, before a byte of a tensor is."""

from __future__ import annotations

import os
from typing import Any

from loaders.checkpoint import Checkpoint
from loaders.checks import token_problems
from loaders.config import config_from_json
from loaders.errors import CheckpointError, reason
from loaders.files.index import INDEX, merged, read_headers, safetensors_files, weight_map
from loaders.files.parallel import PinnedFiles, read_files
from loaders.files.strict_json import BadJson, parse_object
from loaders.quantization.documents import DOCUMENT as QUANTIZATION
from loaders.sources import Identity, OpenFile, Source, open_source, small_file

CONFIG, GENERATION = "config.json", "generation_config.json"


def open_checkpoint(uri: str | os.PathLike[str]) -> Checkpoint:
    """Open a Hugging Face checkpoint: ``config.json`` with ``model.safetensors``, or with an index and its files.

    Only JSON and headers are read; JSON that changed before all headers were read is an error.

    Args:
        uri: its directory or address, of the kinds that ``loaders.sources.open_source`` lists.
    Raises:
        CheckpointError: with every problem found in the directory, config.json, the index and all headers; or as soon
            as a server does not answer.
    """
    try:
        source = open_source(uri)
        present = source.names()
    except OSError as error:
        raise CheckpointError(uri, [f"cannot be opened: {reason(error)}"]) from error
    found, documents, problems = _read_documents(source, present)
    config, document, index = None, found.get(CONFIG), found.get(INDEX)
    generation, quantization = found.get(GENERATION, {}), found.get(QUANTIZATION)
    problems += _generation_problems(generation)
    mapped = weight_map(index, problems) if index is not None else None
    names = safetensors_files(present, mapped, INDEX in present, problems)
    headers, identities = read_headers(source, names, problems)
    tensors = merged(headers, mapped, complete=len(headers) == len(names), problems=problems)
    if document is not None:
        config, of_config = config_from_json(document, beside=quantization, found=tensors)
        problems = of_config + problems
    if problems or config is None or document is None:
        raise CheckpointError(source, problems)
    metadata = {name: header.metadata for name, header in headers.items()}
    checkpoint = Checkpoint(
        config=config,
        tensors=tensors,
        config_document=document,
        generation_document=generation,
        quantization_document=quantization or {},
        metadata=metadata,
        files=PinnedFiles(source, identities),
        documents=PinnedFiles(source, documents),
    )
    checkpoint.documents.check()
    return checkpoint


def _read_documents(
    source: Source, present: list[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Identity], list[str]]:
    """JSON by the name of its file, as far as it is there and can be read; identities, likewise; and what is wrong."""

    def read(file: OpenFile) -> tuple[dict[str, Any] | None, list[str]]:
        try:
            return parse_object(small_file(file, file.opened.num_bytes)), []
        except BadJson as error:
            return None, [f"{file.name} {error}"]

    def unreadable(name: str, why: str) -> str:
        hint = "" if name in present else ". Is this a Hugging Face checkpoint?"
        return f"{name} cannot be read: {why}{hint}"

    names = [CONFIG, *(name for name in (GENERATION, QUANTIZATION, INDEX) if name in present)]
    return read_files(source, names, read, unreadable)


def _generation_problems(generation: dict[str, Any]) -> list[str]:
    found = generation.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    pad = generation.get("pad_token_id")
    problems = token_problems(GENERATION, "eos_token_id", ids)
    return problems + token_problems(GENERATION, "pad_token_id", [] if pad is None else [pad])
