"""Tiny models that show a bug: real Hugging Face checkpoints, made from (name, seed) alone, without transformers.

Random weights as libraries initialise them hide most bugs (norms of one, zero biases, logits near zero). Here every
branch moves the residual stream by its own size, no two norms are alike, logits spread over about 3, and no two sizes
agree by accident. What that means in numbers is checked in tests/parity/test_zoo.py.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loaders import CheckpointError, dtypes
from loaders.config import config_from_json
from loaders.families import family_module
from loaders.spec import ModelConfig, Rule, expand
from loaders.writer import DEFAULT_FILE_BYTES, TensorType, write_checkpoint

# Canary tokens: rows of the embedding that show what ordinary rows hide.
TINY_TOKEN, TINY_SCALE = 11, 1e-3  # its mean square is near rms_norm_eps: a wrong eps shows
HUGE_TOKEN, HUGE_SCALE = 13, 30.0  # overflow, and the maximum that a scale is computed from
TWIN_TOKENS = (16, 17)  # equal rows; in a tied model equal logits, where argmax must take the first
SMALLEST_VOCAB = 19

# Standard deviation of a weight times sqrt(fan-in), by the tensor's axes; all others 1.5. Tuned so that every attention
# and MLP adds about 1 to a residual stream that starts at 1.
GAINS = {
    "D NH": 2.0,  # averaging over keys has made its input smaller
    "D F": 1.2,
    "D M": 1.2,
    "E D": 2.0,  # the choice of experts must survive bf16, and the last one chosen must still be heard
}
LOGIT_GAIN = 3.0  # standard deviation of the logits, nearly

Spelling = Literal["v5", "hub"]


@dataclass(frozen=True)
class ZooModel:
    """One architecture and its config.json, under the names our config classes use.

    ``spelled_v5`` renames keys where transformers 5 writes other names than published checkpoints have.
    """

    architecture: str
    model_type: str
    config: Mapping[str, Any]
    spelled_v5: Mapping[str, str] = field(default_factory=dict)


# head_dim is not hidden / heads, heads over groups is odd or 2, q's width is not hidden_size; nothing divides by 16
_DENSE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "max_window_layers": 4,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_YARN = {"rope_type": "yarn", "rope_theta": 50000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_SMALL = {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6}
_MOE = {
    **{key: value for key, value in _DENSE.items() if key != "max_window_layers"},
    "head_dim": 16,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def _dense(**changes: Any) -> ZooModel:
    return ZooModel("Qwen3ForCausalLM", "qwen3", _DENSE | changes)


def _moe(**changes: Any) -> ZooModel:
    return ZooModel("Qwen3MoeForCausalLM", "qwen3_moe", _MOE | changes, {"num_experts": "num_local_experts"})


ZOO: dict[str, ZooModel] = {
    "qwen3": _dense(),
    "qwen3-tied": _dense(tie_word_embeddings=True),
    "qwen3-bias": _dense(attention_bias=True),
    "qwen3-sliding": _dense(use_sliding_window=True, sliding_window=24, layer_types=_MIXED),
    "qwen3-yarn": _dense(max_position_embeddings=256, rope_parameters=_YARN, head_dim=16),
    "qwen3-deep": _dense(**_SMALL, num_hidden_layers=12),  # layer 10 sorts before layer 2 as text
    "qwen3-moe": _moe(),
    "qwen3-moe-nonorm": _moe(norm_topk_prob=False, decoder_sparse_step=2, mlp_only_layers=[], tie_word_embeddings=True),
}


def zoo_config(name: str, *, spelling: Spelling = "v5", dtype: str = "F32", **config_overrides: Any) -> dict[str, Any]:
    """config.json of a zoo model.

    Args:
        name: key of ``ZOO``.
        spelling: ``"v5"`` as transformers 5 writes it (``rope_parameters``, ``dtype``), ``"hub"`` as published
            checkpoints do (``rope_theta``, ``rope_scaling``, ``torch_dtype``).
        dtype: safetensors name of what the weights will be stored in.
        config_overrides: keys of the zoo entry to change, ``rope_parameters`` included.
    """
    model = ZOO[name]
    config = {"architectures": [model.architecture], "model_type": model.model_type, **model.config, **config_overrides}
    dtype_name = dtypes.to_numpy(dtype).name
    if spelling == "v5":
        config |= {"dtype": dtype_name, "transformers_version": "5.23.0"}
        return {model.spelled_v5.get(key, key): value for key, value in config.items()}
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    return config | {"torch_dtype": dtype_name, "transformers_version": "4.51.0"}


def make_checkpoint(
    name: str,
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    dtype: str = "F32",
    spelling: Spelling = "v5",
    ship_tied_head: bool = False,
    max_file_bytes: int = DEFAULT_FILE_BYTES,
    **config_overrides: Any,
) -> Path:
    """Write a zoo model to ``directory``.

    A tensor depends on its name, its shape, the zoo name and the seed alone, so two checkpoints that differ in an
    option share all other weights, and two dtypes are two roundings of one model.

    Args:
        name: key of ``ZOO``.
        directory: new or empty.
        seed: another seed is another model of the same shapes.
        dtype: safetensors name of a float dtype, for every tensor.
        spelling: see ``zoo_config``.
        ship_tied_head: write the redundant ``lm_head.weight`` of a tied model, as some published checkpoints do.
        max_file_bytes: smaller ones give several files.
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
    drawn = {tensor: (rule, shape) for rule, tensor, shape in _tensors(config, ship_tied_head)}

    def read(tensor: str) -> np.ndarray:
        rule, shape = drawn[tensor]
        source = rule.tied_to if rule.tied_to is not None and config.tie_word_embeddings else tensor
        rng = np.random.default_rng(list(hashlib.sha256(f"{name}\n{seed}\n{source}".encode()).digest()))
        values = _draw(drawn[source][0], config, shape, rng)
        return values.astype(np.float32).astype(dtypes.to_numpy(dtype))

    plan = {tensor: TensorType(dtype, shape) for tensor, (_, shape) in drawn.items()}
    generation = {"do_sample": False, "eos_token_id": list(config.eos_token_id)}
    return write_checkpoint(
        directory, plan, read, config=document, generation=generation, max_file_bytes=max_file_bytes
    )


def _tensors(config: ModelConfig, ship_tied_head: bool) -> Iterator[tuple[Rule, str, tuple[int, ...]]]:
    """Every checkpoint tensor with the rule it comes from."""
    for rule in family_module(config.architecture).RULES:
        specs = expand([rule], config)
        for spec in specs:
            for source in spec.sources:
                yield rule, source.tensor, spec.tensor_shape
        for tied in specs.tied if ship_tied_head else ():
            yield rule, tied.tensor, tied.shape


def _draw(rule: Rule, config: ModelConfig, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Weights of one tensor in float64, by what its axes and its place say it is."""
    values = rng.standard_normal(shape)
    if rule.on == "embedding":
        return _with_canaries(values, config)
    if rule.tensor.endswith(".bias"):
        return 0.3 * values
    if len(shape) == 1:
        return 1 + 0.3 * values
    gain = LOGIT_GAIN if rule.on == "head" else GAINS.get(rule.dims, 1.5)
    return values * (gain / np.sqrt(shape[-1]))


def _with_canaries(values_VD: np.ndarray, config: ModelConfig) -> np.ndarray:
    if config.tie_word_embeddings:
        values_VD = values_VD * (LOGIT_GAIN / np.sqrt(values_VD.shape[1]))  # it is the head too
    values_VD[TINY_TOKEN] *= TINY_SCALE
    if not config.tie_word_embeddings:
        values_VD[HUGE_TOKEN] *= HUGE_SCALE  # as a head row it would win every argmax, and then predict itself for ever
    values_VD[TWIN_TOKENS[1]] = values_VD[TWIN_TOKENS[0]]
    return values_VD


def canaries(config: ModelConfig) -> tuple[int, ...]:
    """Token ids that every row of ``prompts`` holds: all of the above and the last of the vocabulary."""
    return (TINY_TOKEN, HUGE_TOKEN, *TWIN_TOKENS, config.vocab_size - 1)


def prompts(
    config: ModelConfig,
    *,
    rows: int = 3,
    tokens: int = 96,
    padding: Literal["right", "left"] | None = "right",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """``input_ids`` and ``attention_mask``, int64 [B, T], with every canary in every row.

    Rows have different lengths, the first all of ``tokens``, the last about half; with ``padding=None`` all are full.
    What stands under the padding is random too: whoever looks at it gets a different answer.
    """
    found = canaries(config)
    if tokens < 2 * len(found):
        raise ValueError(f"tokens={tokens} has no room for {len(found)} canaries in half a row")
    rng = np.random.default_rng([seed, rows, tokens])
    ids_BT = rng.integers(0, config.vocab_size, (rows, tokens))
    mask_BT = np.zeros((rows, tokens), np.int64)
    for row in range(rows):
        length = tokens if padding is None else tokens - row * (tokens // 2) // max(rows - 1, 1)
        start = tokens - length if padding == "left" else 0
        mask_BT[row, start : start + length] = 1
        ids_BT[row, start + rng.choice(length, len(found), replace=False)] = found
    return {"input_ids": ids_BT, "attention_mask": mask_BT}
