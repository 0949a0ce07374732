"""Models that see, as few are published: what transformers makes of their config.json is what is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_oracle import relative_error
from test_qwen3_vl import BAR, SIDES, numpy, states
from vision_cases import EXPERTS, HYBRID, Case, reference, write

import loaders
import torch_models
from parity.oracle import oracle_forward
from parity.zoo.pictures import pictures

DEEP = {"deepstack_visual_indexes": [0, 2]}
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
CASES = {
    "window": Case("Qwen3VL", WINDOW, DEEP),
    "window moe": Case("Qwen3VLMoe", EXPERTS | WINDOW, DEEP),
    "levels of no block": Case("Qwen3VL", vision={"deepstack_visual_indexes": [8, 16, 24], "hidden_act": "silu"}),
    "a level twice and one of no block": Case(
        "Qwen3VL", vision={"deepstack_visual_indexes": [2, 0, 2, -1, 7], "num_position_embeddings": 50}
    ),
    "more levels than layers": Case(
        "Qwen3VL", {"num_hidden_layers": 1}, {"deepstack_visual_indexes": [0, 1, 2], "hidden_act": "gelu"}
    ),
    "relu": Case("Qwen3_5", HYBRID, {"hidden_act": "relu"}),
}
# JAX shares the config and the table of weights: one case of each backend's own is enough
RUNS = [*(("torch", name) for name in CASES), ("jax", "levels of no block"), ("jax", "more levels than layers")]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Directory of a case's checkpoint, its prompt, and what transformers says of it; made once."""
    made: dict[str, tuple[Path, dict[str, np.ndarray], dict[str, Any]]] = {}

    def build(name: str) -> tuple[Path, dict[str, np.ndarray], dict[str, Any]]:
        if name not in made:
            path = write(CASES[name], tmp_path_factory.mktemp("odd"))
            batch = pictures(loaders.open_checkpoint(path).config, tokens=72)
            made[name] = path, batch, reference(path, batch)
        return made[name]

    return build


@pytest.mark.parametrize(("side", "name"), RUNS)
def test_an_odd_model_is_what_it_is_in_transformers(odd, side, name):
    path, batch, expected = odd(name)
    model, mask = SIDES[side].load(path, dtype="float32"), batch["attention_mask"].astype(bool)
    worst = {key: relative_error(value[mask], expected[key][mask]) for key, value in states(model, batch).items()}
    assert max(worst.values()) <= BAR, worst
    _, *levels = model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    assert len(levels) == sum(key.startswith("deepstack.") for key in expected)


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_of_an_odd_model_agrees_with_transformers(odd, name):
    path, batch, expected = odd(name)
    found, mask = oracle_forward(loaders.open_checkpoint(path), **batch), batch["attention_mask"].astype(bool)
    for key in ("hidden_states.0", "hidden_states.1", "logits"):
        assert relative_error(expected[key][mask], found[key][mask]) <= BAR, key


@pytest.mark.parametrize("side", SIDES)
def test_mergers_that_never_run_are_exported_and_reloaded_as_the_others(odd, side, tmp_path):
    path, _, _ = odd("levels of no block")
    model = SIDES[side].load(path)
    tensors = load_file(model.export(tmp_path / "a") / "model.safetensors")
    stored = load_file(path / "model.safetensors")
    assert tensors.keys() == stored.keys()
    assert all((tensors[name] == stored[name]).all() for name in stored)
    other = tmp_path / "b"
    other.mkdir()
    save_file({name: value * 2 for name, value in stored.items()}, other / "model.safetensors")
    (other / "config.json").write_text((path / "config.json").read_text())
    model = model.update_weights_from_disk(other)
    tensors = load_file(model.export(tmp_path / "c") / "model.safetensors")
    assert all((tensors[name] == 2 * stored[name]).all() for name in stored)


def test_a_first_stage_needs_room_for_the_levels_that_are_used_alone(odd, tmp_path):
    path, _, _ = odd("levels of no block")
    torch_models.load(path, stage=(0, 3))
    path, _, _ = odd("a level twice and one of no block")
    torch_models.load(path, stage=(0, 2))
    with pytest.raises(loaders.CheckpointError, match="has 1 decoder layers, expected at least 2: so many take"):
        torch_models.load(path, stage=(0, 3))
    path, _, _ = odd("more levels than layers")
    torch_models.load(path, stage=(0, 1))


def _version_4(document: dict[str, Any]) -> None:
    text = document["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"], text["rope_scaling"] = rope["rope_theta"], {"type": "default"}
    text["rope_scaling"]["mrope_section"] = rope["mrope_section"]
    if "partial_rotary_factor" in rope:
        text["partial_rotary_factor"] = rope["partial_rotary_factor"]


def _tied_inside(document: dict[str, Any]) -> None:
    document["text_config"]["tie_word_embeddings"] = True
    document.pop("tie_word_embeddings", None)


def _deepstack(document: dict[str, Any]) -> None:
    document["vision_config"]["deepstack_visual_indexes"] = [0]


EDITS = [("window", _version_4), ("relu", _version_4), ("window", _tied_inside), ("relu", _tied_inside)]


@pytest.mark.parametrize(("name", "edit"), [*EDITS, ("relu", _deepstack)])
def test_a_config_in_other_words_is_read_as_transformers_reads_it(
    odd, tmp_path, name, edit: Callable[[dict[str, Any]], None]
):
    path, batch, expected = odd(name)
    document = json.loads((path / "config.json").read_text())
    edit(document)
    (tmp_path / "config.json").write_text(json.dumps(document))
    shutil.copy(path / "model.safetensors", tmp_path)
    mask, peer = batch["attention_mask"].astype(bool), reference(tmp_path, batch)
    assert relative_error(peer["logits"][mask], expected["logits"][mask]) == 0  # the edit says the same to it
    logits = numpy(torch_models.load(tmp_path, dtype="float32")(**batch))
    assert relative_error(logits[mask], peer["logits"][mask]) <= BAR
