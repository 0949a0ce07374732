"""Of how a checkpoint is quantised a stage is held to its own modules; a tie is looked at wherever the table is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_models
import torch_models
from loaders import CheckpointError, open_checkpoint
from loaders.writing.writer import TensorType, write_checkpoint
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint

FULL, DELTA = "full_attention", "linear_attention"
SIZES = block_sizes("qwen3_5-moe") | {"num_hidden_layers": 2}
pytestmark = pytest.mark.parametrize("package", [jax_models, torch_models], ids=lambda package: package.__name__)


def changed(source: Path, directory: Path, change: Any) -> Path:
    """A copy with other tensors: ``change`` of a name and an array gives what takes their place, None: themselves."""
    checkpoint, arrays = open_checkpoint(source), {}
    for name in checkpoint.tensors:
        array = checkpoint.read(name)
        found = change(name, array)
        arrays |= {name: array} if found is None else found
    documents = {"config": checkpoint.config_document, "quantization": checkpoint.quantization_document or None}
    plan = {name: TensorType.of(array) for name, array in arrays.items()}
    return write_checkpoint(directory, plan, arrays.__getitem__, **documents)


def with_scaled_cache(directory: Path) -> Path:
    """Its second layer has no attention, and the draft, which has, no scales."""
    options = {"layer_types": [FULL, DELTA], "quantization": ZooQuantization(kv_cache=True)}
    return make_checkpoint("qwen3_5-moe", directory, **options, **SIZES)


def with_experts_plain_by_class(directory: Path) -> Path:
    """No document leaves them alone: those of transformers are no Linears, and they are stored plain."""
    recipe = ZooQuantization(spelling="compressed-tensors", exclude=("*experts.[0-9]*",))
    path = make_checkpoint("qwen3_5-moe", directory, layer_types=[DELTA, FULL], quantization=recipe, **SIZES)
    document = json.loads((path / "config.json").read_text())
    ignored = document["quantization_config"]["ignore"]
    document["quantization_config"]["ignore"] = [name for name in ignored if ".experts" not in name]
    (path / "config.json").write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("make", "stage", "mtp"),
    [(with_scaled_cache, (1, 2), True), (with_experts_plain_by_class, (0, 2), False)],
    ids=["cache", "experts"],
)
def test_a_stage_takes_what_it_exported_and_afterwards_the_checkpoint(
    package: Any, make: Any, stage: tuple[int, int], mtp: bool, tmp_path: Path
) -> None:
    checkpoint = make(tmp_path / "checkpoint")
    model = package.load(checkpoint, stage=stage, mtp=mtp)
    digests = model.digests()
    own = model.export(tmp_path / "own")
    for uri in (own, checkpoint, own):
        model = model.update_weights_from_disk(uri)
        assert model.digests() == digests
    again = package.load(own, stage=stage, mtp=mtp).update_weights_from_disk(checkpoint)
    assert again.digests() == digests


def test_what_is_held_is_still_compared(package: Any, tmp_path: Path) -> None:
    quantised = with_scaled_cache(tmp_path / "quantised")
    plain = make_checkpoint("qwen3_5-moe", tmp_path / "plain", layer_types=[FULL, DELTA], **SIZES)
    cast = ZooQuantization()
    without_cache = make_checkpoint(
        "qwen3_5-moe", tmp_path / "none", layer_types=[FULL, DELTA], quantization=cast, **SIZES
    )
    for stage in ((0, 2), (1, 2)):
        model = package.load(quantised, stage=stage)
        with pytest.raises(CheckpointError, match="it is not quantised, and the model is"):
            model.update_weights_from_disk(plain)
        with pytest.raises(CheckpointError, match="it is quantised, and the model is not"):
            package.load(plain, stage=stage).update_weights_from_disk(quantised)
    with pytest.raises(CheckpointError, match="it has no FP8 cache, expected an FP8 cache with scales"):
        package.load(quantised, stage=(0, 2)).update_weights_from_disk(without_cache)


@pytest.mark.parametrize("stage", [None, (0, 2), (1, 2)], ids=["whole", "first", "last"])
def test_a_tied_head_is_held_against_the_table_wherever_that_is(
    package: Any, stage: tuple[int, int] | None, tmp_path: Path
) -> None:
    sizes = {"num_hidden_layers": 2, "tie_word_embeddings": True}
    good = make_checkpoint("qwen3", tmp_path / "good", ship_tied_head=True, **sizes)

    def flipped(name: str, array: np.ndarray) -> dict[str, np.ndarray] | None:
        return {name: array[::-1].copy()} if name == "lm_head.weight" else None

    bad, model = changed(good, tmp_path / "bad", flipped), package.load(good, stage=stage)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        package.load(bad, stage=stage)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        model.update_weights_from_disk(bad)
    assert model.update_weights_from_disk(good).version == 2
