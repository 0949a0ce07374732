"""The zoo's checkpoints and transformers' models of them, for the tests of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from loaders import Checkpoint, open_checkpoint
from loaders.reading.plan import specs_of
from loaders.spec import Specs
from loaders.stage import Stage
from parity.zoo import ZOO, make_checkpoint, prompts

SPARSE = [name for name in ZOO if "num_experts" in ZOO[name].config]
TIED = [name for name in ZOO if ZOO[name].config["tie_word_embeddings"]]
WRAPPED = [name for name in ZOO if ZOO[name].wrapper]
HYBRID = [name for name in ZOO if "linear_attention" in ZOO[name].config.get("layer_types", ())]


def checkpoints(directories: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """``make_checkpoint`` and open it, once for every name and options."""

    @cache
    def made(name: str, **options: Any) -> Checkpoint:
        return open_checkpoint(make_checkpoint(name, directories.mktemp(name) / "checkpoint", **options))

    return made


def peers() -> Callable[..., Any]:
    """transformers' model of a checkpoint, of the very class that is declared, in float32 unless told."""

    @cache
    def loaded(checkpoint: str, dtype: torch.dtype) -> Any:
        document = open_checkpoint(checkpoint).config_document
        auto: Any = AutoModelForImageTextToText if "vision_config" in document else AutoModelForCausalLM
        model, report = auto.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
        assert [type(model).__name__] == document["architectures"]
        return model.eval()

    return lambda checkpoint, dtype=torch.float32: loaded(str(checkpoint.source), dtype)


def text_of(model: Any) -> Any:
    """The text model inside one of transformers."""
    return getattr(model.model, "language_model", model.model)


def specs(checkpoint: Checkpoint) -> Specs:
    """Every parameter, the draft's too, as this checkpoint has it."""
    return specs_of(checkpoint.config, Stage(mtp=checkpoint.config.num_mtp_layers > 0), checkpoint.tensors)


def inputs(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in prompts(checkpoint.config).items()}


def logits_of(model: Any, checkpoint: Checkpoint) -> np.ndarray:
    """Float64 [real tokens, V]."""
    given = inputs(checkpoint)
    with torch.no_grad():
        return model(**given).logits[given["attention_mask"].bool()].double().numpy()


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
