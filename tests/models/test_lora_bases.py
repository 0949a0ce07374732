"""Adapters over bases that are not whole: a stage of a pipeline, a quantised head, weights that a failure left."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import torch_models
from loaders import CheckpointError, open_checkpoint
from loaders.adapters.merging import merge_overflows, merged, whole_overflows
from loaders.adapters.sites import sites_of
from loaders.adapters.updates import Adapter, LowRank
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint, prompts
from parity.zoo.adapters import ATTENTION, TABLES, make_adapter

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


@pytest.mark.parametrize("number", [65504, -65504, 65505, -65505, 65520, -65520, 1e6, -1e6])
def test_numbers_are_beyond_a_dtype_where_it_rounds_them_to_infinity(made, number):
    config, name = open_checkpoint(made("qwen3")).config, "model.norm.weight"

    def overflows(number, dtype):
        adapter = Adapter("it", {}, {name: np.array([1, number], np.float32)})
        return whole_overflows(adapter, config, {name: np.dtype(dtype)})

    with np.errstate(over="ignore"):
        expected = not np.isfinite(np.float32(number).astype(np.float16))
    assert bool(overflows(number, np.float16)) is expected
    assert not overflows(number, np.float32)
    assert not overflows(number, np.uint8)  # codes: a copy of a quantised layer is not quantised


@pytest.mark.parametrize(("delta", "is_too_large"), [(8, False), (15, False), (40, True), (-40, False), (3e5, True)])
def test_an_update_is_too_large_for_the_weight_that_it_is_of(made, delta, is_too_large):
    """A weight is the largest number there is: 16 more, and float16 rounds to infinity."""
    site = sites_of(open_checkpoint(made("qwen3")).config).low_rank["lm_head"]
    base = np.zeros(site.shape, np.float16)
    base[1, 2] = np.finfo(np.float16).max
    a, b = np.zeros((2, site.shape[1]), np.float32), np.zeros((site.shape[0], 2), np.float32)
    a[0, 2], b[1, 0] = 4, delta / 4 / 0.5
    adapter = Adapter("it", {"lm_head": LowRank(site, a, b, 0.5)}, {})
    found = merge_overflows(adapter, {site.parameter: base.dtype}, lambda _: base)
    with np.errstate(over="ignore"):
        assert bool(np.isinf(merged(base, adapter.low_rank["lm_head"])).any()) is is_too_large
    assert bool(found) is is_too_large


def scaled(adapter, part, by):
    """The adapter, with the tensors in whose names is ``part`` so much larger."""
    file = adapter / "adapter_model.safetensors"
    save_file({name: value * (by if part in name else 1) for name, value in load_file(file).items()}, file)
    return adapter


@pytest.mark.parametrize("side", BACKENDS)
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_what_the_models_dtype_cannot_hold_is_refused_and_not_made_infinite(made, tmp_path, side, dtype):
    """A tensor brought whole is held as the model's own is; an update that is attached is float32 and may be any."""
    path = made("qwen3", dtype=dtype)
    model = load(side, path, dtype="float32")
    before, given = model.digests(), batch(path)
    whole = scaled(make_adapter(path, tmp_path / "whole", whole=("norm",)), "model.norm", 1e5)
    large = scaled(make_adapter(path, tmp_path / "large", targets=("lm_head",)), "lora_B", 3e5)
    if dtype == "F16":
        with pytest.raises(CheckpointError, match=r"'model.norm.weight' has numbers up to .*, more than float16 holds"):
            model.attach_lora(whole)
    else:
        assert np.isfinite(np.asarray(load(side, path, dtype="float32").attach_lora(whole)(**given))).all()
    adapted = model.attach_lora(large)
    assert np.isfinite(np.asarray(adapted(**given))).all()
    if dtype == "F16":
        with pytest.raises(ValueError, match="'lm_head.weight' would have numbers that float16 does not hold"):
            adapted.merge_lora("default")
        assert adapted.digests() == before
        adapted = adapted.detach_lora("default").attach_lora(make_adapter(path, tmp_path / "usual"))
    merged = adapted.merge_lora("default")
    assert np.isfinite(np.asarray(merged(**given))).all()
    assert merged.digests() != before


@pytest.fixture(params=["qwen3", "qwen3-tied"])
def with_tables(request, made, tmp_path):
    """A checkpoint, an adapter of PEFT's that has both tables whole and writes them three times, and its logits."""
    path = made(request.param)
    peft = importlib.import_module("peft")
    base = importlib.import_module("transformers").AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=list(TABLES)))
    generator = torch.Generator().manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    ids = batch(path)["input_ids"]
    return path, tmp_path / "adapter", ids, adapted.eval()(torch.from_numpy(ids)).logits.detach().numpy()


@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers
@pytest.mark.parametrize("side", BACKENDS)
def test_tables_that_peft_writes_three_times_are_those_it_reads(side, with_tables):
    path, adapter, ids, expected = with_tables
    names = load_file(adapter / "adapter_model.safetensors")
    assert sum("modules_to_save" in name for name in names) == sum("original_module" in name for name in names) == 2
    found = np.asarray(load(side, path, dtype="float32").attach_lora(adapter)(ids))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    for part, said in (("lm_head.modules_to_save", "both are of one module"), ("original_module", "of another base")):
        wrong = scaled(adapter, part, 2)
        with pytest.raises(CheckpointError, match=said):
            load(side, path).attach_lora(wrong)
        scaled(adapter, part, 0.5)
