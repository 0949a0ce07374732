"""Adapters over bases that are not whole: a stage of a pipeline, a quantised head, weights that a failure left."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

import torch_models
from loaders import CheckpointError, open_checkpoint
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint, prompts
from parity.zoo_adapters import ATTENTION, TABLES, make_adapter

BACKENDS = ("torch", "jax")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The checkpoint of a zoo model, made once."""
    root = tmp_path_factory.mktemp("bases")
    found = {}

    def of(zoo, **options):
        key = (zoo, *sorted(options.items()))
        if key not in found:
            found[key] = make_checkpoint(zoo, root / str(len(found)), num_hidden_layers=2, **options)
        return found[key]

    return of


def load(side, path, **options):
    return importlib.import_module(f"{side}_models").load(path, **options)


def batch(path):
    return prompts(open_checkpoint(path).config, rows=2, tokens=12)


@pytest.mark.parametrize("zoo", ["qwen3", "qwen3-tied"])
@pytest.mark.parametrize("side", BACKENDS)
@pytest.mark.parametrize("targets", [TABLES, ("q_proj", *TABLES[1:])], ids=["tables", "head"])
def test_a_stage_attaches_what_peft_saves_with_tables_it_does_not_have(made, tmp_path, zoo, side, targets):
    path = made(zoo)
    adapter = make_adapter(path, tmp_path / "adapter", targets=targets, base_layer=True)
    first, last = (load(side, path, stage=(index, 2)).attach_lora(adapter) for index in range(2))
    given = batch(path)
    mask = {name: array for name, array in given.items() if name != "input_ids"}
    found = np.asarray(last(hidden_states=first(**given), **mask))
    expected = np.asarray(torch_models.load(path).attach_lora(adapter)(**given))
    real = given["attention_mask"] == 1
    np.testing.assert_allclose(found[real], expected[real], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("side", BACKENDS)
def test_a_table_of_another_base_is_refused_where_it_can_be_compared(made, tmp_path, side):
    path = made("qwen3")
    adapter = make_adapter(path, tmp_path / "adapter", targets=TABLES, base_layer=True)
    model = load(side, path).update_weights_from_disk(made("qwen3", seed=1))
    with pytest.raises(CheckpointError, match="the adapter is of another base"):
        model.attach_lora(adapter)
    bare = make_adapter(path, tmp_path / "bare", targets=TABLES)
    assert list(model.attach_lora(bare).adapters) == ["default"]


@pytest.mark.parametrize("fp8", [(), ("lm_head",)], ids=["nvfp4", "fp8"])
@pytest.mark.parametrize("side", BACKENDS)
def test_an_adapter_of_the_unquantised_model_attaches_over_a_quantised_head(made, tmp_path, side, fp8):
    sizes = {"dtype": "BF16", **block_sizes("qwen3")}
    plain, quantization = made("qwen3", **sizes), ZooQuantization(activations=False, unify=False, head=True, fp8=fp8)
    adapter = make_adapter(plain, tmp_path / "adapter", targets=("q_proj", *TABLES), base_layer=True)
    model = load(side, made("qwen3", quantization=quantization, **sizes)).attach_lora(adapter)
    left_out = model.adapters["default"].adapter.left_out
    assert left_out == tuple(f"base_model.model.{name}.base_layer.weight" for name in ("lm_head", "model.embed_tokens"))


@pytest.mark.parametrize("side", BACKENDS)
def test_a_router_is_merged_and_unmerged_as_other_layers_are(made, tmp_path, side):
    path = made("qwen3-moe")
    adapter = make_adapter(path, tmp_path / "adapter", targets=("gate",))
    model, given = load(side, path), batch(path)
    real, base = given["attention_mask"] == 1, np.asarray(model(**given))
    model = model.attach_lora(adapter)
    adapted = np.asarray(model(**given))
    assert np.abs(adapted - base)[real].max() > 0.1
    model = model.merge_lora()
    np.testing.assert_allclose(np.asarray(model(**given))[real], adapted[real], rtol=2e-4, atol=2e-4)
    model = model.unmerge_lora().detach_lora()
    np.testing.assert_array_equal(np.asarray(model(**given)), base)


class Fails(dict):
    """Weights whose last ones cannot be read, once."""

    is_mended = False

    def items(self):
        for number, pair in enumerate(super().items()):
            if number == 3 and not self.is_mended:
                raise RuntimeError("the device is gone")
            yield pair


@pytest.fixture
def half_unmerged(made, tmp_path):
    """A model whose ``unmerge_lora`` failed half-way, and its logits before and after it was merged."""
    path = made("qwen3")
    model = torch_models.load(path)
    before = model(**batch(path))
    adapter = make_adapter(path, tmp_path / "adapter", targets=ATTENTION)
    model.attach_lora(adapter)
    adapted = model(**batch(path))
    model.merge_lora()
    model.room.unmerged = Fails(model.room.unmerged)
    with pytest.raises(RuntimeError, match="the device is gone"):
        model.unmerge_lora()
    with pytest.raises(RuntimeError, match="Call unmerge_lora again, or update_weights_from_disk"):
        model(**batch(path))
    return model, before, adapted


def test_a_merge_that_was_undone_half_way_can_be_undone_again(made, half_unmerged):
    model, before, adapted = half_unmerged
    given = batch(made("qwen3"))
    with pytest.raises(RuntimeError, match="the device is gone"):
        model.unmerge_lora()
    model.room.unmerged.is_mended = True
    model.unmerge_lora()
    assert torch.equal(model(**given), adapted)
    assert torch.equal(model(**given, adapter=[None] * 2), before)


def test_a_merge_that_was_undone_half_way_ends_with_a_reload(made, half_unmerged):
    model, before, adapted = half_unmerged
    given = batch(made("qwen3"))
    with pytest.raises(CheckpointError):
        model.update_weights_from_disk("nowhere")
    assert model.roster.merged == "default"  # nothing was read: what it was before can still be written
    model.update_weights_from_disk(made("qwen3"))
    assert torch.equal(model(**given), adapted)
    assert torch.equal(model(**given, adapter=[None] * 2), before)
    with pytest.raises(ValueError, match="no adapter is merged"):
        model.unmerge_lora()
