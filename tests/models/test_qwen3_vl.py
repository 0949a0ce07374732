"""Models that see against transformers, on checkpoints that it wrote: images, a video, rows of text alone.

float32: the tower, every hidden state and the logits. bfloat16: the ruler. Generation: token for token.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_oracle import relative_error
from vision_cases import CASES, reference, write

import jax_models
import loaders
import torch_models
from jax_models.sharding import MESH_AXES
from loaders.host.inputs import left_aligned
from parity.oracle import oracle_forward
from parity.zoo import make_checkpoint
from parity.zoo.draft import make_drafting_checkpoint
from parity.zoo.pictures import pictures

BAR = 2e-5
SIDES = {"jax": jax_models, "torch": torch_models}


@pytest.fixture(scope="session")
def seeing(tmp_path_factory):
    """Directory of a case's checkpoint, written once."""

    @functools.cache
    def build(name: str) -> Path:
        return write(CASES[name], tmp_path_factory.mktemp("seeing"))

    return build


@pytest.fixture(scope="session")
def load(seeing):
    """A case's model on one side, loaded once."""
    return functools.cache(lambda side, name, dtype=None: SIDES[side].load(seeing(name), dtype=dtype or "float32"))


@pytest.fixture(scope="session")
def said(seeing):
    """What transformers says of a case's prompt."""
    return functools.cache(lambda name, padding: reference(seeing(name), batch_of(seeing(name), padding)))


def batch_of(directory: Path, padding: str) -> dict[str, np.ndarray]:
    return pictures(loaders.open_checkpoint(directory).config, tokens=72, padding=padding)


def numpy(value: Any) -> np.ndarray:
    return value.float().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, np.float32)


def without_text(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}


def states(model: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    logits, taps = model.with_taps(**batch)
    path = model.config.text_paths[0]
    found = {"logits": numpy(logits), "hidden_states.0": numpy(taps[f"{path}.embed_tokens"])}
    for layer in range(model.config.num_hidden_layers):
        found[f"hidden_states.{layer + 1}"] = numpy(taps[f"{path}.layers.{layer}"])
    return found


# what takes JAX long to compile and shows it little that is new
SLOW = [
    pytest.param("jax", name, marks=pytest.mark.slow) for name in ("vl yarn", "vl moe square experts", "hybrid moe")
]
QUICK = [(side, name) for name in CASES for side in SIDES if (side, name) not in [param.values for param in SLOW]]


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(("side", "name"), [*QUICK, *SLOW])
def test_every_hidden_state_and_the_logits_are_those_of_transformers(load, seeing, said, side, name, padding):
    batch = batch_of(seeing(name), padding)
    expected, mask = said(name, padding), batch["attention_mask"].astype(bool)
    got = states(load(side, name), batch)
    worst = {key: relative_error(value[mask], expected[key][mask]) for key, value in got.items()}
    assert max(worst.values()) <= BAR, worst


@pytest.mark.parametrize(("side", "name"), [*QUICK, *SLOW])
def test_the_towers_tokens_are_those_of_transformers(load, seeing, said, side, name):
    batch = batch_of(seeing(name), "right")
    tokens, *levels = load(side, name).get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    expected = said(name, "right")
    assert relative_error(numpy(tokens), expected["image_features"]) <= BAR
    assert len(levels) == sum(key.startswith("deepstack.") for key in expected)
    for level, tokens in enumerate(levels):
        assert relative_error(numpy(tokens), expected[f"deepstack.{level}"]) <= BAR


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_agrees_with_transformers(seeing, said, name):
    batch = batch_of(seeing(name), "right")
    found = oracle_forward(loaders.open_checkpoint(seeing(name)), **batch)
    mask = batch["attention_mask"].astype(bool)
    for key in ("hidden_states.0", "hidden_states.1", "logits"):
        assert relative_error(said(name, "right")[key][mask], found[key][mask]) <= BAR, key


@pytest.mark.parametrize("name", ["vl", "vl moe", "hybrid"])
@pytest.mark.parametrize("side", SIDES)
def test_generation_goes_on_as_in_transformers_where_an_image_took_fewer_positions_than_tokens(
    load, seeing, side, name
):
    batch = batch_of(seeing(name), "left")
    architecture = loaders.open_checkpoint(seeing(name)).config.architecture
    peer = getattr(transformers, architecture).from_pretrained(seeing(name), dtype=torch.float32).eval()
    given = {key: torch.from_numpy(value) for key, value in batch.items()}
    expected = peer.generate(**given, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    got = load(side, name).generate(batch["input_ids"], batch["attention_mask"], 6, **without_text(batch))
    np.testing.assert_array_equal(np.asarray(got), expected.numpy())


@pytest.mark.parametrize("side", SIDES)
def test_a_row_is_what_it_is_alone(load, seeing, side):
    model, batch = load(side, "vl"), batch_of(seeing("vl"), "right")
    together = numpy(model(**batch))
    length = int(batch["attention_mask"][2].sum())  # text alone
    alone = numpy(model(batch["input_ids"][2:, :length]))
    assert relative_error(together[2, :length], alone[0]) <= BAR
    shown = batch["image_grid_thw"][:2].prod(1).sum()
    first = {"pixel_values": batch["pixel_values"][:shown], "image_grid_thw": batch["image_grid_thw"][:2]}
    alone = numpy(model(batch["input_ids"][:1], **first))
    assert relative_error(together[0], alone[0]) <= BAR


@pytest.mark.parametrize("side", SIDES)
def test_stages_of_a_pipeline_see_as_the_whole_does(load, seeing, side):
    batch = batch_of(seeing("vl"), "right")
    first, last = (SIDES[side].load(seeing("vl"), dtype="float32", stage=(index, 2)) for index in range(2))
    positions, _ = first.get_rope_index(**batch)
    hidden = first(**batch)
    logits = last(hidden_states=hidden, attention_mask=batch["attention_mask"], position_ids=positions)
    mask = batch["attention_mask"].astype(bool)
    assert relative_error(numpy(logits)[mask], numpy(load(side, "vl")(**batch))[mask]) <= BAR
    with pytest.raises(ValueError, match="only the first stage sees"):
        last(hidden_states=hidden, **without_text(batch))


@pytest.mark.parametrize("name", ["vl moe", "hybrid"])
@pytest.mark.slow_unless("vl moe")
def test_on_a_mesh_pictures_are_seen_as_on_one_device(load, seeing, said, name):
    batch, expected = batch_of(seeing(name), "right"), said(name, "right")
    mesh = jax.make_mesh((2, 2, 2), MESH_AXES, devices=jax.devices()[:8])
    model = jax_models.load(seeing(name), dtype="float32", mesh=mesh)
    mask = batch["attention_mask"].astype(bool)
    assert relative_error(numpy(model(**batch))[mask], expected["logits"][mask]) <= BAR
    prompt = (batch["input_ids"], batch["attention_mask"], 4)
    tokens = [found.generate(*prompt, ignore_eos=True, **without_text(batch)) for found in (model, load("jax", name))]
    np.testing.assert_array_equal(*map(np.asarray, tokens))
    again = model.update_weights_from_disk(seeing(name))
    np.testing.assert_array_equal(np.asarray(again(**batch)), np.asarray(model(**batch)))


@pytest.mark.parametrize("side", SIDES)
def test_a_first_stage_too_short_for_its_levels_is_refused(seeing, side):
    with pytest.raises(loaders.CheckpointError, match="expected at least 2: so many take"):
        SIDES[side].load(seeing("vl"), stage=(0, 3))


@pytest.mark.parametrize("side", SIDES)
def test_text_alone_is_loaded_without_the_tower_and_says_so(seeing, side, tmp_path):
    model = SIDES[side].load(seeing("vl"), vision=False)
    assert all(name.startswith("model.visual.") for name in model.report.left_out)
    assert len(model.report.left_out) == sum(
        name.startswith("model.visual.") for name in loaders.open_checkpoint(seeing("vl")).tensors
    )
    with pytest.raises(ValueError, match="the vision tower is not held here: load the model without vision=False"):
        model(**batch_of(seeing("vl"), "right"))
    model.export(tmp_path / "export")  # whole: what was left out is copied
    assert (
        loaders.open_checkpoint(tmp_path / "export").tensors.keys()
        == loaders.open_checkpoint(seeing("vl")).tensors.keys()
    )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["vl", "hybrid"])
def test_a_reload_brings_another_tower_and_back(load, seeing, side, name, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(seeing(name) / "model.safetensors")
    changed = {key: value * (0.5 if "visual" in key else 1) for key, value in tensors.items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    (other / "config.json").write_text((seeing(name) / "config.json").read_text())
    batch, model = batch_of(seeing(name), "right"), SIDES[side].load(seeing(name), dtype="float32")
    before = numpy(model(**batch))
    model = model.update_weights_from_disk(other)
    cold = numpy(SIDES[side].load(other, dtype="float32")(**batch))
    assert (numpy(model(**batch)) == cold).all()
    assert not (cold == before).all()
    model = model.update_weights_from_disk(seeing(name))
    assert (numpy(model(**batch)) == before).all()


@pytest.mark.parametrize("side", SIDES)
def test_a_tower_that_is_not_there_is_asked_about_once(seeing, side, tmp_path):
    tensors = load_file(seeing("vl") / "model.safetensors")
    save_file(
        {key: value for key, value in tensors.items() if "visual" not in key},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "config.json").write_text((seeing("vl") / "config.json").read_text())
    with pytest.raises(loaders.CheckpointError, match="none of its 57 tensors is there. For text alone") as caught:
        SIDES[side].load(tmp_path)
    assert len(caught.value.problems) == 1
    SIDES[side].load(tmp_path, vision=False)


def test_both_backends_pass_the_ruler_in_bfloat16(tmp_path):
    from parity.backends import open_backend
    from parity.compare import compare
    from parity.record import default_inputs, record
    from parity.record_oracle import record_oracle

    path = make_checkpoint("qwen3_vl", tmp_path / "a", dtype="BF16")
    checkpoint = loaders.open_checkpoint(path)
    inputs = default_inputs(checkpoint)
    ours, theirs = (record(path, open_backend(side), inputs) for side in SIDES)
    found = compare(ours, theirs, record_oracle(checkpoint, inputs, probes=0))
    assert found.verdict == "PASS", str(found)


def pictures_of(path: Path) -> dict[str, np.ndarray]:
    return pictures(loaders.open_checkpoint(path).config)


@pytest.mark.parametrize("side", SIDES)
def test_a_draft_sees_what_its_model_sees(tmp_path, side):
    path = make_checkpoint("qwen3_5-wrapped", tmp_path / "a")
    model, batch = SIDES[side].load(path, mtp=True), pictures_of(path)
    expected = oracle_forward(loaders.open_checkpoint(path), **batch, mtp=True)
    logits, hidden = model.mtp_forward(**batch)
    mask = batch["attention_mask"][:, 1:].astype(bool)
    assert relative_error(numpy(logits)[mask], expected["mtp.logits"][mask]) <= BAR
    assert relative_error(numpy(hidden)[mask], expected["mtp.hidden_state"][mask]) <= BAR


@pytest.mark.parametrize("side", SIDES)
def test_drafted_tokens_are_those_without_a_draft_after_pictures(tmp_path, side, monkeypatch):
    path = make_drafting_checkpoint("qwen3_5-wrapped", tmp_path / "a", quiet=0.08)
    model, batch = SIDES[side].load(path, mtp=True), pictures_of(path)
    prompt = (batch["input_ids"], batch["attention_mask"])
    draft, owner, first = model.draft, model.programs.draft if side == "jax" else torch_models.draft.Draft, []
    extend = owner.extend

    def spy(*args, **kwargs):
        found = extend(*args, **kwargs)
        first.append(numpy(found[0]).copy())
        return found

    monkeypatch.setattr(owner, "extend", spy)
    plain = np.asarray(model.generate(*prompt, 12, ignore_eos=True, **without_text(batch)), np.int64)
    found = model.generate(*prompt, 12, ignore_eos=True, draft=draft, draft_tokens=2, **without_text(batch))
    np.testing.assert_array_equal(numpy(found), plain)
    assert 0 < draft.report.accepted < draft.report.drafted
    # what it first said: of every row and its first new token, which the oracle judges above
    ids, mask = (left_aligned(array, prompt[1]) for array in prompt)
    longer = {"input_ids": np.c_[ids, plain[:, 0]], "attention_mask": np.pad(mask, ((0, 0), (0, 1)), constant_values=1)}
    shown = {name: value for name, value in without_text(batch).items() if name != "mm_token_type_ids"}
    logits, _ = model.mtp_forward(**longer, **shown)
    assert relative_error(first[0], numpy(logits)[:, -1]) <= BAR
