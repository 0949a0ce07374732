"""What a newcomer calls by mistake is told what to do instead, on both backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jax_models
import torch_models
from loaders import CheckpointError, open_checkpoint
from parity.inspection import open_subject
from parity.zoo import make_checkpoint

IDS = [[3, 14, 15, 92, 65]]
PACKAGES = [jax_models, torch_models]
pytestmark = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("misuse") / "checkpoint", num_hidden_layers=2)


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> dict[str, Any]:
    return {package.__name__: package.load(checkpoint) for package in PACKAGES}


def test_a_name_of_the_hub_is_no_directory_and_how_to_get_one_is_said(package: Any) -> None:
    with pytest.raises(CheckpointError, match=r"Qwen/Qwen3-0.6B is not a directory that exists.* hf download NAME"):
        package.load("Qwen/Qwen3-0.6B")


def test_a_file_of_a_checkpoint_is_not_the_checkpoint(package: Any, checkpoint: Path) -> None:
    for opened in (package.load, open_subject):
        with pytest.raises(CheckpointError, match="(not a directory but a file|one file of a checkpoint)"):
            opened(str(checkpoint / "model.safetensors"))


@pytest.mark.parametrize("keyword", ["max_tokens", "do_sample"])
def test_a_keyword_that_there_is_not_is_named(package: Any, models: dict[str, Any], keyword: str) -> None:
    with pytest.raises(TypeError, match=rf"unexpected keyword '{keyword}'\. Beside .* only images and videos"):
        models[package.__name__].generate(IDS, **{keyword: 3})


def test_a_mask_of_other_numbers_and_one_of_another_shape_are_told_apart(package: Any, models: dict[str, Any]) -> None:
    model = models[package.__name__]
    with pytest.raises(ValueError, match=r"attention_mask holds 2, expected 0 \(padding\) or 1 \(real\)"):
        model(IDS, [[1, 1, 1, 1, 2]])
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 2\), expected that of input_ids, \(1, 5\)"):
        model(IDS, [[1, 1]])


def test_positions_out_of_range_and_of_another_shape_are_told_apart(package: Any, models: dict[str, Any]) -> None:
    model = models[package.__name__]
    with pytest.raises(ValueError, match=r"position_ids holds -1 to 3, expected 0 to 2147483647"):
        model(IDS, position_ids=np.arange(5)[None] - 1)
    with pytest.raises(ValueError, match=r"position_ids is int64 \(1, 2\), expected integers \(1, 5\)"):
        model(IDS, position_ids=np.zeros((1, 2), np.int64))


def test_a_whole_model_does_not_speak_of_pipelines(package: Any, models: dict[str, Any]) -> None:
    model = models[package.__name__]
    with pytest.raises(ValueError, match="input_ids are missing"):
        model()
    with pytest.raises(ValueError, match="this is the whole model"):
        model(IDS, hidden_states=np.zeros((1, 5, 64), np.float32))


def test_a_stage_says_how_it_is_called(package: Any, checkpoint: Path) -> None:
    stage = package.load(checkpoint, stage=(0, 2))
    with pytest.raises(ValueError, match=r"this takes the whole model, and this is stage 0 of 2.*hidden_states="):
        stage.generate(IDS)


def test_looking_at_a_module_that_there_is_not_is_an_error(package: Any, models: dict[str, Any]) -> None:
    model = models[package.__name__]
    for decode in ({}, {"decode": 2}):
        with pytest.raises(ValueError, match=r"within='model\.nope' names nothing that this run has at level='layers'"):
            model.with_taps(IDS, within="model.nope", **decode)
    _, found = model.with_taps(IDS, within="model.layers.1")
    assert list(found) == ["model.layers.1"]


def test_of_another_architecture_that_is_the_first_problem(
    package: Any, models: dict[str, Any], tmp_path: Path
) -> None:
    other, model = make_checkpoint("qwen3-moe", tmp_path / "other"), models[package.__name__]
    with pytest.raises(CheckpointError, match="architecture is Qwen3MoeForCausalLM") as caught:
        model.update_weights_from_disk(other)
    assert caught.value.problems[0].endswith("as it is live. Load it as a new model.")
    assert model.version == 1


def test_graphs_and_donation_are_taken_or_refused_where_they_are_asked_for(
    package: Any, models: dict[str, Any], checkpoint: Path
) -> None:
    model = models[package.__name__]
    if package is jax_models:
        with pytest.raises(ValueError, match="every step is one compiled program already"):
            model.generate(IDS, graphs=True)
        with pytest.raises(ValueError, match="input_ids are missing"):
            model.apply(model.weights)
        with pytest.raises(ValueError, match="this is the whole model"):
            model.apply(model.weights, jnp.array(IDS), hidden_states=jnp.zeros((1, 5, 64)))
    else:
        with pytest.raises(ValueError, match="donate=False: PyTorch reloads in place"):
            model.update_weights_from_disk(checkpoint, donate=False)
        assert package.load(checkpoint).update_weights_from_disk(checkpoint, donate=True).version == 2


def test_a_device_that_there_is_not_is_a_value_error(package: Any, checkpoint: Path) -> None:
    if package is jax_models:  # whose devices are those of a mesh, or JAX's default
        with pytest.raises(TypeError, match="device"):
            package.load(checkpoint, device="gpu")
        return
    for device in ("gpu", "cuda:99", "meta"):
        with pytest.raises(ValueError, match=rf"torch has no device '{device}'.* Expected cpu, cuda or cuda:N"):
            package.load(checkpoint, device=device)


def test_a_tensor_that_there_is_not_is_named_and_so_is_the_checkpoint(package: Any, checkpoint: Path) -> None:
    with pytest.raises(KeyError, match="has no tensor 'nope'"):
        open_checkpoint(checkpoint).read("nope")
    if package is jax_models:
        with pytest.raises(CheckpointError, match="there is nothing there, expected a directory that save wrote"):
            package.restore(checkpoint / "no save")
