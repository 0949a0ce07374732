"""The zoo's checkpoints, written to disk, and prompts for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loaders import CheckpointError, dtypes
from loaders.config import config_from_json
from loaders.spec import ModelConfig
from loaders.writing.writer import DEFAULT_FILE_BYTES, TensorType, write_checkpoint
from parity.zoo.models import ZOO, Form, Spelling, zoo_config
from parity.zoo.quantized import ZooQuantization, quantize_zoo
from parity.zoo.weights import HUGE_TOKEN, SMALLEST_VOCAB, TINY_TOKEN, TWIN_TOKENS, zoo_weights


def make_checkpoint(
    name: str,
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    dtype: str = "F32",
    spelling: Spelling = "v5",
    experts: Form | None = None,
    draft_experts: Form | None = None,
    text_path: str | None = None,
    ship_tied_head: bool = False,
    max_file_bytes: int = DEFAULT_FILE_BYTES,
    quantization: ZooQuantization | None = None,
    **config_overrides: Any,
) -> Path:
    """Write a zoo model to ``directory``.

    A tensor depends on its name, its shape, the zoo name and the seed alone, so two checkpoints that differ in an
    option share all other weights, and two dtypes are two roundings of one model. Two forms of the experts are one
    model too.

    Args:
        name: key of ``ZOO``.
        directory: new or empty.
        seed: another seed is another model of the same shapes.
        dtype: safetensors name of a float dtype, for every tensor but those published as F32 whatever the others are.
        spelling: see ``zoo_config``.
        experts: form of the experts where the family has several; None: the zoo entry's.
        draft_experts: of the multi-token-prediction draft's, likewise.
        text_path: path of the text model in tensor names, of ``config.text_paths``; None: the first.
        ship_tied_head: write the redundant ``lm_head.weight`` of a tied model, as some published checkpoints do.
        max_file_bytes: smaller ones give several files.
        quantization: quantise it; experts then come one by one. Sizes for it are in ``block_sizes``.
        config_overrides: see ``zoo_config``.
    Raises:
        CheckpointError: the overrides make a config that our loader refuses.
    """
    document = zoo_config(name, spelling=spelling, dtype=dtype, **config_overrides)
    config, problems = config_from_json(document)
    if config is None:
        raise CheckpointError(f"zoo model {name}", problems)
    if config.vocab_size < SMALLEST_VOCAB:
        raise ValueError(f"vocab_size={config.vocab_size} has no room for the canaries, expected >= {SMALLEST_VOCAB}")
    if text_path is not None and text_path not in config.text_paths:
        raise ValueError(f"text_path={text_path!r}, expected one of {', '.join(config.text_paths)}")
    model = ZOO[name]
    weights = zoo_weights(
        name,
        model,
        config,
        seed=seed,
        experts=(experts or ("per expert" if quantization else model.experts[0]), draft_experts or model.experts[1]),
        text_path=text_path or config.text_paths[0],
        ship_tied_head=ship_tied_head,
    )
    plan = {tensor: TensorType(weight.dtype or dtype, weight.shape) for tensor, weight in weights.items()}

    def read(tensor: str) -> np.ndarray:
        return weights[tensor].draw().astype(np.float32).astype(dtypes.to_numpy(plan[tensor].dtype))

    values: Callable[[str], np.ndarray] = read
    beside = None
    if quantization is not None:
        plan, values, inside, beside = quantize_zoo(name, config, plan, read, quantization, seed=seed)
        document |= {} if inside is None else {"quantization_config": inside}
    documents = {
        "config": document,
        "generation": {"do_sample": False, "eos_token_id": list(config.eos_token_id)},
        "quantization": beside,
    }
    return write_checkpoint(directory, plan, values, **documents, max_file_bytes=max_file_bytes)


def _plain(config: ModelConfig, ids: np.ndarray) -> np.ndarray:
    """Ids without those that stand for what is shown: others in their place."""
    special = () if config.vision is None else (config.vision.image_token_id, config.vision.video_token_id)
    return np.where(np.isin(ids, special), ids - 10, ids)


def canaries(config: ModelConfig) -> tuple[int, ...]:
    """Token ids that every row of ``prompts`` holds: all of the above and the last of the vocabulary."""
    return (TINY_TOKEN, HUGE_TOKEN, *TWIN_TOKENS, config.vocab_size - 1)


def prompts(
    config: ModelConfig,
    *,
    rows: int = 3,
    tokens: int = 96,
    padding: Literal["right", "left", "both"] | None = "right",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """``input_ids`` and ``attention_mask``, int64 [B, T], with every canary in every row.

    Rows have different lengths, the first all of ``tokens``, the last about half; with ``padding=None`` all are full.
    ``"both"``: the second, fourth, ... are padded on the right, the others on the left.
    What stands under the padding is random too: whoever looks at it gets a different answer.
    """
    found = canaries(config)
    if tokens < 2 * len(found):
        raise ValueError(f"tokens={tokens} has no room for {len(found)} canaries in half a row")
    rng = np.random.default_rng([seed, rows, tokens])
    ids_BT = _plain(config, rng.integers(0, config.vocab_size, (rows, tokens)))
    mask_BT = np.zeros((rows, tokens), np.int64)
    for row in range(rows):
        length = tokens if padding is None else tokens - row * (tokens // 2) // max(rows - 1, 1)
        start = tokens - length if padding == "left" or (padding == "both" and row % 2 == 0) else 0
        mask_BT[row, start : start + length] = 1
        ids_BT[row, start + rng.choice(length, len(found), replace=False)] = found
    return {"input_ids": ids_BT, "attention_mask": mask_BT}
