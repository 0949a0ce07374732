"""The draft of Qwen3.5 on both backends against transformers' own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qwen3_5_cases import CASES, draft_reference, inputs_of, write
from reference import relative_error

import jax_models
import torch_models
from loaders import CheckpointError
from parity.zoo import make_checkpoint
from parity.zoo.pictures import pictures

BOUND = 2e-5
MODELS = {"jax": jax_models, "torch": torch_models}
# what ships its draft's experts one by one is fused for transformers, which reads them in no other form
TWINS = {name: dataclasses.replace(case, experts="fused", draft_experts="fused") for name, case in CASES.items()}
NAMES = ["dense", "tied biased odd heads bf16 files", "wrapped tied", "moe", "wrapped moe bf16 files"]
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return functools.cache(
        lambda name, is_twin=False: write((TWINS if is_twin else CASES)[name], tmp_path_factory.mktemp("checkpoint"))
    )


@functools.lru_cache(maxsize=4)
def drafting(backend: str, directory: Path) -> Any:
    return MODELS[backend].load(directory, dtype="float32", mtp=True)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "plain") for name in NAMES), ("dense", "far"), ("wrapped tied", "three axes")]
)
def test_the_draft_agrees_with_transformers(name: str, kind: str, checkpoint_of: Build) -> None:
    inputs = inputs_of(kind, rows=2)
    want = draft_reference(checkpoint_of(name, is_twin=True), inputs)
    assert 1 < want["logits"].std() < 6
    found = {}
    for backend in MODELS:
        logits, hidden = drafting(backend, checkpoint_of(name)).mtp_forward(**inputs)
        for part, got in (("logits", logits), ("hidden", hidden)):
            found[backend, part] = relative_error(np.asarray(got.detach() if backend == "torch" else got), want[part])
    print({" ".join(key): f"{error:.1e}" for key, error in found.items()})
    assert max(found.values()) <= BOUND, found


def test_the_drafts_experts_are_one_by_one_where_the_case_says_so(checkpoint_of: Build) -> None:
    kinds = {name: drafting("torch", checkpoint_of(name)).checkpoint.tensors for name in NAMES if "moe" in name}
    single, fused = "mtp.layers.0.mlp.experts.4.up_proj.weight", "mtp.layers.0.mlp.experts.gate_up_proj"
    assert single in kinds["moe"]
    assert fused in kinds["wrapped moe bf16 files"]
    assert "model.layers.0.mlp.experts.gate_up_proj" in kinds["moe"]


@pytest.mark.parametrize("backend", MODELS)
@pytest.mark.parametrize("kind", ["left", "right"])
@pytest.mark.slow_unless("*-torch", "left-jax")
def test_a_row_of_a_padded_batch_drafts_as_if_alone(kind: str, backend: str, checkpoint_of: Build) -> None:
    model, inputs = drafting(backend, checkpoint_of("dense")), inputs_of(kind, rows=2, tokens=70)
    logits, _ = model.mtp_forward(**inputs)
    for row, mask_T in enumerate(inputs["attention_mask"] == 1):
        alone, _ = model.mtp_forward(inputs["input_ids"][row : row + 1, mask_T])
        is_pair_T = mask_T[1:] & mask_T[:-1]
        assert relative_error(np.asarray(logits)[row, is_pair_T], np.asarray(alone)[0]) <= BOUND


@pytest.mark.parametrize("backend", MODELS)
@pytest.mark.parametrize("name", ["dense", "wrapped tied"])
@pytest.mark.slow_unless("*-torch", "wrapped tied-jax")
def test_the_last_stage_drafts_as_the_whole_model(name: str, backend: str, checkpoint_of: Build) -> None:
    directory, inputs = checkpoint_of(name), inputs_of("left", rows=2, tokens=70)
    whole = drafting(backend, directory)
    want = [np.asarray(part) for part in whole.mtp_forward(**inputs)]
    for count in (2, 3):
        stages = [
            MODELS[backend].load(directory, dtype="float32", stage=(i, count), mtp=i == count - 1) for i in range(count)
        ]
        hidden = stages[0](**inputs)
        for stage in stages[1:-1]:
            hidden = stage(attention_mask=inputs["attention_mask"], hidden_states=hidden)
        got = [np.asarray(part) for part in stages[-1].mtp_forward(**inputs, hidden_states=hidden)]
        real_BT = inputs["attention_mask"][:, 1:] * inputs["attention_mask"][:, :-1] == 1
        for ours, theirs in zip(got, want, strict=True):
            if backend == "torch":
                np.testing.assert_array_equal(ours, theirs)
            assert relative_error(ours[real_BT], theirs[real_BT]) <= 2e-6


@pytest.mark.parametrize("backend", MODELS)
def test_the_draft_of_a_later_stage_has_no_embeddings_of_pictures_and_says_so(backend: str, tmp_path: Path) -> None:
    """It took their placeholders for text: off by 0.6 to 0.8 where images stood, without a word."""
    path = make_checkpoint("qwen3_5-wrapped", tmp_path / "it", num_hidden_layers=4)
    first, last = (MODELS[backend].load(path, stage=(index, 2), mtp=True) for index in range(2))
    shown = pictures(first.config, rows=3, tokens=96, padding=None)
    ids, types = shown.pop("input_ids"), shown.pop("mm_token_type_ids")
    hidden = first(ids, **shown, mm_token_type_ids=types)
    tower = "stage 1 of 2 has no embeddings of them: the tower is on stage 0"
    with pytest.raises(ValueError, match=rf"pixel_values, .*given, but the draft of {tower}"):
        last.mtp_forward(ids, hidden_states=hidden, **{k: x for k, x in shown.items() if "pixel" in k})
    with pytest.raises(ValueError, match=rf"input_ids has \d+ tokens that stand for images or videos, but .* {tower}"):
        last.mtp_forward(ids, hidden_states=hidden)
    (text,) = np.flatnonzero(~types.any(axis=1))
    row = slice(text, text + 1)
    as_text = last.mtp_forward(ids, hidden_states=hidden, mm_token_type_ids=np.zeros_like(ids))[0][row]
    alone = last.mtp_forward(ids[row], hidden_states=hidden[row])[0]
    assert relative_error(np.asarray(as_text), np.asarray(alone)) <= 2e-6


@pytest.mark.parametrize("backend", MODELS)
def test_a_draft_not_asked_for_is_left_out_and_counted(backend: str, checkpoint_of: Build) -> None:
    model = MODELS[backend].load(checkpoint_of("moe"))
    tensors = {name for name in model.checkpoint.tensors if name.startswith("mtp.")}
    assert len(tensors) == 3 * 5 + 17  # experts one by one
    assert set(model.report.left_out) == tensors
    assert not set(drafting(backend, checkpoint_of("moe")).report.left_out)
    with pytest.raises(ValueError, match="load it with mtp=True"):
        model.mtp_forward(np.zeros((1, 4), int))


@pytest.mark.parametrize("backend", MODELS)
def test_a_draft_asked_for_and_not_there_is_refused(backend: str, checkpoint_of: Build, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = checkpoint_of("dense")
    tensors = load_file(source / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not name.startswith("mtp.")}
    save_file(kept, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    assert MODELS[backend].load(tmp_path).report.left_out == ()
    with pytest.raises(CheckpointError, match=r"mtp\.fc\.weight"):
        MODELS[backend].load(tmp_path, mtp=True)
