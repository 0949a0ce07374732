"""Quantised checkpoints that differ from what the zoo writes in ways that exporters do: scalars, scales, caches."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from lives import BACKENDS

from loaders import CheckpointError, open_checkpoint
from loaders.digest import digests
from loaders.reading.plan import plan_load
from loaders.stage import Stage
from loaders.writing.writer import TensorType, write_checkpoint
from parity.backends import open_backend
from parity.record import record
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint, prompts

LAYERS = {"num_hidden_layers": 2}
HYBRID = LAYERS | {"layer_types": ["linear_attention", "full_attention"]}
SPELLINGS = ("modelopt", "compressed-tensors")
UP = "model.layers.1.mlp.up_proj"


def zoo(path, how, *, name="qwen3", seed=0):
    sizes = {**block_sizes(name), **(HYBRID if name == "qwen3_5" else LAYERS)}
    return make_checkpoint(name, path, seed=seed, quantization=how, **sizes)


def rewritten(path, to, change):
    """The checkpoint at ``path`` with its tensors changed: ``change(name, array)`` is the new one; None: it is gone."""
    whole = open_checkpoint(path)
    changed = {name: change(name, whole.read(name)) for name in whole.tensors}
    tensors = {name: array for name, array in changed.items() if array is not None}
    types = {name: TensorType.of(array) for name, array in tensors.items()}
    documents = {"config": whole.config_document, "quantization": whole.quantization_document or None}
    return write_checkpoint(to, types, tensors.__getitem__, **documents)


def is_scalar(name):
    return name.endswith(("weight_scale_2", "_global_scale", "input_scale", "k_scale", "v_scale"))


def turned(name, array):
    """Scalars as the other exporter writes them: [] and not [1], [1] and not []."""
    return array.reshape(() if array.shape else (1,)) if is_scalar(name) else array


def logits(model):
    inputs = prompts(model.config, rows=1, tokens=12, padding=None)
    found = model(inputs["input_ids"])
    return found.float().numpy() if isinstance(found, torch.Tensor) else np.asarray(found, np.float32)


def on_disk(path):
    checkpoint = open_checkpoint(path)
    return digests(checkpoint.stream(names=plan_load(checkpoint, Stage()).tensors))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "spelling"), [("qwen3", "modelopt"), ("qwen3-moe", "compressed-tensors")])
@pytest.mark.slow_unless("*-torch", "qwen3-modelopt-jax")
def test_scales_of_either_rank_are_the_same_and_are_exported_as_they_came(backend, name, spelling, tmp_path):
    """compressed-tensors' own ModelOptNvfp4Converter writes [], other writers of ModelOpt's names [1]."""
    how = ZooQuantization(spelling=spelling, kv_cache=spelling == "modelopt")
    path = zoo(tmp_path / "A", how, name=name)
    other = rewritten(path, tmp_path / "B", turned)
    model = open_backend(backend).load(path)
    expected, digests_of = logits(model), {one: on_disk(one) for one in (path, other)}
    assert digests_of[path] != digests_of[other]  # shapes count
    for number, one in enumerate((other, path, other)):
        model = model.update_weights_from_disk(one)
        assert model.digests() == digests_of[one]
        assert logits(model).tobytes() == expected.tobytes()
        assert on_disk(model.export(tmp_path / str(number))) == digests_of[one]
    assert open_backend(backend).load(other).digests() == digests_of[other]


def test_scales_of_another_size_are_refused(tmp_path):
    path = zoo(tmp_path / "A", ZooQuantization())

    def change(name, array):
        return np.tile(array, (2,)) if name == f"{UP}.weight_scale_2" else turned(name, array)

    with pytest.raises(CheckpointError) as caught:
        plan_load(open_checkpoint(rewritten(path, tmp_path / "B", change)), Stage())
    assert [problem for problem in caught.value.problems if f"{UP}.weight_scale_2' has shape (2,)" in problem]
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_that_is_none_is_refused_and_the_old_weights_serve_on(backend, spelling, value, tmp_path):
    path = zoo(tmp_path / "A", ZooQuantization(spelling=spelling))
    leaves = ("weight_scale_2", "input_scale") if spelling == "modelopt" else ("weight_global_scale",)
    bad = {f"{UP}.{leaf}" for leaf in leaves}

    def change(name, array):
        return np.full_like(array, value) if name in bad else array

    broken = rewritten(path, tmp_path / "B", change)
    load = open_backend(backend).module.load
    with pytest.raises(CheckpointError) as caught:
        load(broken)
    assert {problem.split("'")[1] for problem in caught.value.problems} == bad
    assert f"is {value}, expected a scale above zero and finite" in caught.value.problems[0]
    model = load(path)
    before = model.digests()
    with pytest.raises(CheckpointError, match="expected a scale above zero"):
        model.update_weights_from_disk(broken)
    assert (model.digests(), model.version) == (before, 1)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow_unless("torch-*", "jax-qwen3")
def test_a_cache_that_casts_computes_what_scales_of_one_do(backend, name, tmp_path):
    """ModelOpt's recipes end in ``kv_fp8_cast``: its largest magnitude is 448, the scale 1, and no tensor says so."""

    def ones(name, array):
        return np.ones_like(array) if name.endswith(("k_scale", "v_scale")) else array

    def cast(name, array):
        return None if name.endswith(("k_scale", "v_scale")) else array

    how = ZooQuantization(activations=False, kv_cache=True)
    path = zoo(tmp_path / "A", how, name=name)
    scaled, without = rewritten(path, tmp_path / "ones", ones), rewritten(path, tmp_path / "cast", cast)
    load = open_backend(backend).module.load
    model = load(without)
    assert (model.quantizes_inputs, model.rounds_cache) == (False, True)
    expected = logits(load(scaled))
    assert logits(model).tobytes() == expected.tobytes()
    assert not any("k_scale" in tensor for tensor in model.digests())
    unrounded = load(without, activation_quantization=False)
    assert not unrounded.rounds_cache
    assert np.abs(logits(unrounded) - expected).max() > 1e-3
    before = model.digests()
    with pytest.raises(CheckpointError, match="an FP8 cache with scales, expected an FP8 cache without scales"):
        model.update_weights_from_disk(scaled)
    assert model.update_weights_from_disk(without).digests() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_in_fp8_is_no_quantised_input_and_a_trace_tells_them_apart(backend, tmp_path):
    path = zoo(tmp_path / "A", ZooQuantization(activations=False, kv_cache=True))
    used = open_backend(backend)
    inputs = prompts(open_checkpoint(path).config, rows=1, tokens=12, padding=None)
    for weight_only in (False, True):
        meta = record(path, used, inputs, weight_only=weight_only).meta
        assert meta["weight_only"] is weight_only
        assert (meta["precision"]["quantized_inputs"], meta["precision"]["rounded_cache"]) == (False, not weight_only)
    with pytest.raises(ValueError, match="no scales for inputs"):
        used.module.load(path, activation_quantization=True)
    with pytest.raises(CheckpointError, match="quantised already, and not as quantize='nvfp4' would: an FP8 cache"):
        used.module.load(path, quantize="nvfp4")  # what is quantised later would never have the scales


@pytest.mark.parametrize("asked", ["no", 0, 1, "False"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_quantization_is_a_bool_or_none(backend, asked, tmp_path):
    path = zoo(tmp_path / "A", ZooQuantization())
    with pytest.raises(ValueError, match=f"activation_quantization={asked!r} is not understood"):
        open_backend(backend).module.load(path, activation_quantization=asked)


def test_weights_only_is_refused_where_nothing_is_quantised(tmp_path):
    path = make_checkpoint("qwen3", tmp_path / "A", **LAYERS)
    with pytest.raises(ValueError, match="is not quantised, so there is nothing to switch off"):
        record(path, open_backend("torch"), weight_only=True)


def test_two_documents_in_other_words_are_one_checkpoint(tmp_path):
    path = zoo(tmp_path / "A", ZooQuantization(exclude=("model.layers.0.self_attn*",)))
    expected = open_checkpoint(path).config
    beside = json.loads((path / "hf_quant_config.json").read_text())
    names = beside["quantization"]["exclude_modules"]
    names[names.index("model.layers.0.self_attn*")] = "model.layers.0.self_attn"
    (path / "hf_quant_config.json").write_text(json.dumps(beside))
    assert open_checkpoint(path).config == expected
