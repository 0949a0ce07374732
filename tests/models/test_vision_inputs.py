"""What is handed to models that see besides pictures: a processor's text, generated placeholders, positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_oracle import relative_error
from test_qwen3_vl import BAR, SIDES, numpy, without_text

import torch_models
from loaders import open_checkpoint
from loaders.host.inputs import left_aligned
from parity.backends import open_backend
from parity.oracle import oracle_forward
from parity.record import read_inputs, record_model
from parity.record_oracle import record_oracle
from parity.zoo import make_checkpoint, prompts
from parity.zoo.pictures import pictures


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint("qwen3_vl", tmp_path_factory.mktemp("seeing") / "a")


@pytest.fixture(scope="module")
def model(path):
    return torch_models.load(path)


@pytest.fixture(scope="module")
def batch(model):
    return pictures(model.config, tokens=48)


@pytest.mark.parametrize("are_types_given", [True, False])
def test_a_placeholder_that_is_generated_is_text(path, model, batch, are_types_given, monkeypatch):
    tower = model.config.vision
    drawn_BN = np.array([[tower.image_token_id, tower.video_token_id, 7]] * len(batch["input_ids"]))
    monkeypatch.setattr(model, "generate", lambda *args, **options: torch.from_numpy(drawn_BN))
    given = batch if are_types_given else {name: x for name, x in batch.items() if name != "mm_token_type_ids"}
    trace = record_model(model, open_backend("torch"), given, max_new_tokens=3)
    assert trace.tensors["generated_ids"].tolist() == drawn_BN.tolist()
    # token by token, and by the oracle over prompt and tokens
    steps = []
    logits, cache = model.prefill(**given)
    for token_B in drawn_BN.T:
        steps.append(numpy(logits).copy())
        logits, cache = model.decode(token_B, cache)
    best = np.sort(np.stack(steps, axis=1), axis=-1)
    np.testing.assert_allclose(trace.tensors["generated_margins"], best[..., -1] - best[..., -2], atol=2e-4)
    names, mask = ("input_ids", "mm_token_type_ids", "attention_mask"), batch["attention_mask"]
    ids, types, real = (left_aligned(batch[name], mask) for name in names)
    grown = without_text(batch) | {
        "input_ids": np.concatenate([ids, drawn_BN[:, :2]], axis=1),
        "mm_token_type_ids": np.pad(types, ((0, 0), (0, 2))),
        "attention_mask": np.pad(real, ((0, 0), (0, 2)), constant_values=1),
    }
    expected = oracle_forward(open_checkpoint(path), **grown)["logits"]
    assert relative_error(np.stack(steps, axis=1), expected[:, -3:]) <= BAR


TEXT_ALONE = {"pixel_values": None, "image_grid_thw": None, "pixel_values_videos": None, "video_grid_thw": None}


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_vl"])
def test_a_processors_text_is_text_to_the_oracle_and_to_records(kind, tmp_path):
    checkpoint = open_checkpoint(make_checkpoint(kind, tmp_path / "a"))
    text = prompts(checkpoint.config, rows=2, tokens=12)
    types = {"mm_token_type_ids": np.zeros_like(text["input_ids"])}
    expected = oracle_forward(checkpoint, **text)["logits"]
    np.testing.assert_array_equal(oracle_forward(checkpoint, **text, **types, **TEXT_ALONE)["logits"], expected)
    np.testing.assert_array_equal(record_oracle(checkpoint, text | types, probes=0).tensors["logits"], expected)
    backend, model = open_backend("torch"), torch_models.load(tmp_path / "a")
    found, plain = (record_model(model, backend, given, max_new_tokens=2) for given in (text | types, text))
    for name in ("logits", "generated_ids", "generated_margins"):
        np.testing.assert_array_equal(found.tensors[name], plain.tensors[name])


@pytest.mark.parametrize("side", SIDES)
def test_a_processors_text_is_taken_by_every_stage_and_without_a_tower(path, side):
    first, last = (SIDES[side].load(path, stage=(index, 2), vision=False) for index in range(2))
    text = prompts(first.config, rows=2, tokens=12)
    zeros = TEXT_ALONE | {"mm_token_type_ids": np.zeros_like(text["input_ids"])}
    hidden = first(**text)
    assert (numpy(first(**text, **zeros)) == numpy(hidden)).all()
    mask = text["attention_mask"]
    expected = numpy(last(hidden_states=hidden, attention_mask=mask))
    assert (numpy(last(hidden_states=hidden, attention_mask=mask, **zeros)) == expected).all()
    ones = zeros | {"mm_token_type_ids": zeros["mm_token_type_ids"] + 1}
    with pytest.raises(ValueError, match="mm_token_type_ids given, but only the first stage sees"):
        last(hidden_states=hidden, attention_mask=mask, **ones)


def test_the_oracle_sees_nothing_where_there_are_no_images(path):
    checkpoint = open_checkpoint(path)
    text = prompts(checkpoint.config, rows=2, tokens=12)
    none = {"pixel_values": np.zeros((0, 96), np.float32), "image_grid_thw": np.zeros((0, 3), np.int64)}
    expected = oracle_forward(checkpoint, **text)["logits"]
    np.testing.assert_array_equal(oracle_forward(checkpoint, **text, **none)["logits"], expected)
    got, mask = numpy(torch_models.load(path)(**text, **none)), text["attention_mask"].astype(bool)
    assert relative_error(got[mask], expected[mask]) <= BAR


def test_pixels_in_bfloat16_are_recorded(path, model, batch, tmp_path):
    narrow = {name: torch.from_numpy(x) for name, x in batch.items()}
    narrow["pixel_values"] = narrow["pixel_values"].bfloat16()
    save_file(narrow, tmp_path / "inputs")
    trace = record_model(model, open_backend("torch"), read_inputs(tmp_path / "inputs"))
    wide = batch | {"pixel_values": narrow["pixel_values"].float().numpy()}
    expected = record_model(model, open_backend("torch"), wide)
    assert trace.meta["input_hash"] == expected.meta["input_hash"]
    np.testing.assert_array_equal(trace.tensors["logits"], expected.tensors["logits"])


@pytest.mark.parametrize("is_shown", [True, False])
def test_of_four_rows_of_positions_the_models_and_the_oracle_take_the_last_three(path, model, batch, is_shown):
    given = batch if is_shown else {name: batch[name] for name in ("input_ids", "attention_mask")}
    rng = np.random.default_rng(5)
    four = rng.integers(0, 40, (4, *batch["input_ids"].shape))
    three, mask = numpy(model(**given, position_ids=four[1:])), batch["attention_mask"].astype(bool)
    assert (numpy(model(**given, position_ids=torch.from_numpy(four))) == three).all()
    expected = oracle_forward(open_checkpoint(path), **given, position_ids=four)["logits"]
    assert relative_error(three[mask], expected[mask]) <= BAR


def test_jax_takes_four_rows_of_positions_checked_and_unchecked(path, batch):
    jax_model = SIDES["jax"].load(path)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    four = np.random.default_rng(5).integers(0, 40, (4, *batch["input_ids"].shape))
    three = numpy(jax_model(**text, position_ids=four[1:]))
    assert (numpy(jax_model(**text, position_ids=four)) == three).all()
    applied = numpy(jax_model.apply(jax_model.weights, **text, position_ids=four, pixel_values=None))
    assert relative_error(applied, three) <= BAR
