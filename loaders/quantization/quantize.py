"""Checkpoints quantised while they are read.

What a trainer sends in bfloat16 becomes the weights of an NVFP4 model (``load(..., quantize="nvfp4")``), and ``tandem
quantize`` writes it down.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from loaders.checkpoint import Checkpoint
from loaders.config import config_from_json
from loaders.errors import CheckpointError
from loaders.files.opening import open_checkpoint
from loaders.quantization.documents import KEY
from loaders.quantization.quantizable import documents, infos, matrices_of
from loaders.quantization.quantized import QuantizedCheckpoint
from loaders.quantization.schemes import BLOCK, Scheme


def quantized(checkpoint: Checkpoint, amax_of_inputs: Mapping[str, float] | None = None) -> QuantizedCheckpoint:
    """The checkpoint with all its linear layers in NVFP4 but those that recipes leave alone.

    Left alone: embedding, head, routers, small gates, convolutions, the draft, and layers whose inputs are no multiple
    of 16.

    Args:
        checkpoint: not quantised.
        amax_of_inputs: module, as the result names it -> largest magnitude of its input. Given, inputs are quantised
            too; then every quantised module must be there.
    Raises:
        CheckpointError: it is quantised already, nothing can be quantised, or inputs are missing.
    """
    if checkpoint.config.quantization is not None:
        raise CheckpointError(checkpoint.source, ["it is quantised already. Load it without quantize."])
    matrices, left_alone = matrices_of(checkpoint)
    if not matrices:
        raise CheckpointError(
            checkpoint.source, [f"no linear layer has a multiple of {BLOCK} inputs: nothing to quantise"]
        )
    inputs = dict(amax_of_inputs or {})
    missing = [module for module in matrices if inputs and module not in inputs]
    if missing:
        raise CheckpointError(checkpoint.source, [f"the calibration saw no input of {module}" for module in missing])
    scheme = Scheme("nvfp4", activations=bool(inputs))
    consumed = {matrix.tensor for matrix in matrices.values()}
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in consumed}
    for matrix in matrices.values():
        tensors |= infos(checkpoint, matrix, scheme)
    inside, beside = documents(scheme, sorted(left_alone))
    document = checkpoint.config_document | {KEY: inside}
    config, problems = config_from_json(document, beside=beside, found=tensors)
    if config is None:
        raise CheckpointError(checkpoint.source, problems)
    given = {one.name: getattr(checkpoint, one.name) for one in dataclasses.fields(Checkpoint)}
    given |= {"config": config, "tensors": tensors, "config_document": document, "quantization_document": beside}
    found = {"plain": checkpoint, "matrices": matrices, "left_alone": left_alone, "amax_of_inputs": inputs}
    return QuantizedCheckpoint(**given, **found)


def open_to_load(uri: str | os.PathLike[str], method: str | None) -> Checkpoint:
    """Open a checkpoint, seen through quantisation if ``method`` says so and it is not quantised itself.

    Raises:
        CheckpointError: as ``open_checkpoint`` and ``quantized``; or it is quantised in another way, so that what is
            quantised later could never be its successor.
        ValueError: another method than ``"nvfp4"``.
    """
    if method not in (None, "nvfp4"):
        raise ValueError(f"quantize={method!r} is not implemented, expected 'nvfp4' or None")
    checkpoint = open_checkpoint(uri)
    quantization = checkpoint.config.quantization
    if method is None:
        return checkpoint
    if quantization is None:
        return quantized(checkpoint)
    others = {str(scheme) for _, scheme in quantization.schemes if scheme != Scheme("nvfp4", activations=False)}
    others |= {"an FP8 cache"} if quantization.kv_cache is not None else set()
    if others:
        found = f"it is quantised already, and not as quantize={method!r} would: {', '.join(sorted(others))}"
        raise CheckpointError(
            checkpoint.source, [f"{found}. What is quantised while it is read has scales of weights only"]
        )
    return checkpoint
