"""Run one of our models on a batch and write down what it computed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from loaders import Checkpoint, open_checkpoint
from loaders.host.multimodal import NAMES as MULTIMODAL
from parity.backend import Inputs, record_backend
from parity.backends import Framework
from parity.model_backend import ModelBackend
from parity.trace import Trace, check_is_file
from parity.zoo import prompts
from parity.zoo.pictures import pictures

INPUTS = ("input_ids", "attention_mask", "position_ids", *MULTIMODAL)


def read_inputs(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Model inputs from a safetensors file.

    Raises:
        ValueError: no file, not safetensors, no ``input_ids``, or a tensor that is not a model input.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    check_is_file(path, "a safetensors file of model inputs")
    try:
        inputs = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    unknown = sorted(set(inputs) - set(INPUTS))
    if "input_ids" not in inputs or unknown:
        raise ValueError(f"{path} holds {sorted(inputs)}, expected input_ids and nothing beside {', '.join(INPUTS)}")
    return inputs


def default_inputs(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Three rows of 96, 72 and 48 tokens, long enough for a rotary bug to show.

    Where a state is handed from chunk to chunk, 136, 102 and 68: what is wrong of the one that the first chunk leaves,
    which has none before it, may reach a token in the third alone, and chunks are of 64.
    The second is padded on the right, the third on the left: behind a row's end nothing looks at padding, before its
    start everything would that does not heed the mask.
    A model that sees is shown images and a video in two of them.
    """
    make = prompts if checkpoint.config.vision is None else pictures
    tokens = 136 if checkpoint.config.is_recurrent else 96
    return make(checkpoint.config, rows=3, tokens=tokens, padding="both")


def row_alone(inputs: Inputs, row: int) -> dict[str, np.ndarray]:
    """One row of text without its padding: ``input_ids`` and ``attention_mask`` [1, its real tokens].

    Raises:
        ValueError: there is no such row, or the inputs are more than text.
    """
    ids = np.asarray(inputs["input_ids"])
    more = sorted(inputs.keys() - {"input_ids", "attention_mask"})
    if more or not 0 <= row < len(ids):
        beside = f", and {', '.join(more)} beside" if more else ""
        raise ValueError(f"row {row} of {len(ids)} rows{beside}: expected 0 to {len(ids) - 1}, of input_ids alone")
    is_real = np.asarray(inputs.get("attention_mask", np.ones_like(ids)))[row].astype(bool)
    alone = ids[row : row + 1, is_real]
    return {"input_ids": alone, "attention_mask": np.ones_like(alone)}


def record_model(
    model: Any, backend: Framework, inputs: Inputs, *, weights_of: Trace | None = None, **options: Any
) -> Trace:
    """What a live model computes on ``inputs``; options are those of ``ModelBackend``.

    ``weights_of``: a trace of the same model with the same weights, so that their digests are not computed again.

    Raises:
        ValueError: bad inputs, or no draft.
    """
    return record_backend(ModelBackend(model, backend, **options), inputs, weights_of=weights_of)


def load_model(
    uri: str | os.PathLike[str],
    backend: Framework,
    *,
    dtype: str | None = None,
    mtp: bool = False,
    weight_only: bool = False,
    adapter: str | os.PathLike[str] | None = None,
) -> Any:
    """Load a checkpoint, and attach an adapter where one is given; arguments are those of ``record``.

    Raises:
        ValueError: ``weight_only`` for a checkpoint that is not quantised.
    """
    if weight_only:
        check_quantized(open_checkpoint(uri))
    model = backend.load(uri, dtype=dtype, mtp=mtp, weight_only=weight_only)
    if adapter is None:
        return model
    with backend.scope():
        return model.attach_lora(adapter)


def check_quantized(checkpoint: Checkpoint) -> None:
    """Raises ValueError for a checkpoint that rounds nothing, of which ``weight_only`` was asked for."""
    if checkpoint.config.quantization is None:
        where = checkpoint.source
        raise ValueError(f"--weight-only: {where} is not quantised, so there is nothing to switch off. Leave it out.")


def record(
    uri: str | os.PathLike[str],
    backend: Framework,
    inputs: Mapping[str, np.ndarray] | None = None,
    *,
    dtype: str | None = None,
    reload: str | os.PathLike[str] | None = None,
    max_new_tokens: int | None = None,
    ignore_eos: bool = False,
    mtp: bool = False,
    weight_only: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    decode: int = 0,
) -> Trace:
    """Load a checkpoint, optionally reload another over it, and record. ``inputs`` default to ``default_inputs``.

    ``adapter``: attach this one, before the reload. ``weight_only``: whatever the checkpoint says, neither inputs of
    quantised layers nor keys and values are rounded. ``decode``: so many last tokens of every row are read one at a
    time.

    Raises:
        ValueError: ``weight_only`` for a checkpoint that is not quantised, or rows that cannot be decoded so.
    """
    model = load_model(uri, backend, dtype=dtype, mtp=mtp, weight_only=weight_only, adapter=adapter)
    if reload is not None:
        with backend.scope():
            model = model.update_weights_from_disk(reload)
    given = default_inputs(model.checkpoint) if inputs is None else inputs
    options = {"max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos, "mtp": mtp, "decode": decode}
    return record_model(model, backend, given, **options)
