"""A checkpoint is opened: config, index and headers are read and validated, before a byte of a tensor is."""

from __future__ import annotations

import os
from typing import Any

from loaders.checkpoint import Checkpoint
from loaders.config import config_from_json
from loaders.errors import CheckpointError, brief
from loaders.index import INDEX, files, merge, read_headers, weight_map
from loaders.quantization_config import DOCUMENT as QUANTIZATION
from loaders.sources import Identity, Source, Unreachable, open_source, small_file
from loaders.strict_json import BadJson, parse_object

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
        raise CheckpointError(uri, [f"cannot be opened: {error.strerror or error}"]) from error
    problems: list[str] = []
    documents: dict[str, Identity] = {}
    config = None
    document = _read_json(source, CONFIG, present, documents, problems)
    generation = _read_json(source, GENERATION, present, documents, problems) if GENERATION in present else {}
    quantization = _read_json(source, QUANTIZATION, present, documents, problems) if QUANTIZATION in present else None
    problems += _generation_problems(generation or {})
    index = _read_json(source, INDEX, present, documents, problems) if INDEX in present else None
    mapped = weight_map(index, problems) if index is not None else None
    names = files(present, mapped, INDEX in present, problems)
    headers, identities = read_headers(source, names, problems)
    tensors = merge(headers, mapped, complete=len(headers) == len(names), problems=problems)
    if document is not None:
        config, found = config_from_json(document, beside=quantization, found=tensors)
        problems = found + problems
    if problems or config is None or document is None:
        raise CheckpointError(source, problems)
    metadata = {name: header.metadata for name, header in headers.items()}
    given = source, config, tensors, document, generation or {}, quantization or {}, metadata
    checkpoint = Checkpoint(*given, identities, documents)
    checkpoint.check_documents()
    return checkpoint


def _read_json(
    source: Source, name: str, present: list[str], documents: dict[str, Identity], problems: list[str]
) -> dict[str, Any] | None:
    """The object in a file, whose identity goes to ``documents``; None: there is none, which is a problem."""
    try:
        with source.open(name) as file:
            documents[name] = file.identity()
            return parse_object(small_file(file, documents[name].num_bytes))
    except BadJson as error:
        problems.append(f"{name} {error}")
    except Unreachable as error:
        raise CheckpointError(source, [f"{name} cannot be read: {error}"]) from error
    except OSError as error:
        hint = "" if name in present else ". Is this a Hugging Face checkpoint?"
        problems.append(f"{name} cannot be read: {error.strerror or error}{hint}")
    return None


def _generation_problems(generation: dict[str, Any]) -> list[str]:
    found = generation.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    problems = []
    if not all(type(token) is int for token in ids):
        problems.append(f"{GENERATION}: eos_token_id is {brief(found)}, expected an integer or a list of integers")
    pad = generation.get("pad_token_id")
    if pad is not None and type(pad) is not int:
        problems.append(f"{GENERATION}: pad_token_id is {brief(pad)}, expected an integer")
    return problems
