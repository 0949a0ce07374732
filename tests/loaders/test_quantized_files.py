"""Quantised checkpoints whose document and tensors do not say the same."""

import json

import pytest
from recipes import HYBRID, SMALL, W4A4, inside, resolved

from loaders import CheckpointError, open_checkpoint
from loaders.reading.plan import plan_load
from loaders.stage import Stage
from loaders.writing.writer import write_checkpoint
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint


def written(tmp_path, change, *, name="qwen3", quantization=None):
    """A quantised zoo model with its tensors and documents changed: ``change(tensors, config, beside)``."""
    layers = HYBRID if "qwen3_5" in name else SMALL
    how = quantization or ZooQuantization()
    whole = open_checkpoint(make_checkpoint(name, tmp_path / "whole", quantization=how, **block_sizes(name) | layers))
    tensors = {tensor: whole.read(tensor) for tensor in whole.tensors}
    types = dict(whole.tensors)
    config, other = json.loads(json.dumps(whole.config_document)), json.loads(json.dumps(whole.quantization_document))
    change(types, config, other)
    return write_checkpoint(
        tmp_path / "changed", types, lambda tensor: tensors[tensor], config=config, quantization=other or None
    )


def test_scales_that_are_missing_or_too_many_are_listed_all_at_once(tmp_path):
    q, k = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"

    def change(types, config, other):
        del types[f"{q}.weight_scale"], types[f"{q}.weight_scale_2"], types[f"{k}.input_scale"]
        other["quantization"]["exclude_modules"].append("model.layers.0.mlp.up_proj")
        config["quantization_config"]["ignore"] = other["quantization"]["exclude_modules"]

    with pytest.raises(CheckpointError) as caught:
        plan_load(open_checkpoint(written(tmp_path, change)), Stage())
    text = "\n".join(caught.value.problems)
    for name in (f"{q}.weight_scale'", f"{q}.weight_scale_2'", f"{k}.input_scale'"):
        assert f"tensor '{name} is missing" in text
    for leaf in ("weight_scale", "weight_scale_2", "input_scale"):
        assert f"tensor 'model.layers.0.mlp.up_proj.{leaf}' of model.safetensors is unexpected" in text
    assert "tensor 'model.layers.0.mlp.up_proj.weight' is U8" in text


def test_experts_of_which_one_projection_is_plain_are_refused_in_one_line(tmp_path):
    """As ModelOpt writes them where a pattern switches off every down_proj; its list of exclusions has no expert."""

    def change(types, config, other):
        for tensor in list(types):
            if "experts" in tensor and ".down_proj." in tensor and not tensor.endswith(".weight"):
                del types[tensor]

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(written(tmp_path, change, name="qwen3-moe"))
    (problem,) = caught.value.problems
    assert f"model.layers.0.mlp.experts are {W4A4} and not quantised, as stored (0.down_proj)" in problem
    assert "One scheme for all is implemented." in problem


def test_a_cache_without_any_scale_is_cast_and_one_that_lacks_some_is_not_whole(tmp_path):
    """ModelOpt writes no scales where the largest magnitude is constant (448, so that they would be 1)."""
    scales = [f"model.layers.{layer}.self_attn.{one}_proj.{one}_scale" for layer in range(2) for one in "kv"]
    how = ZooQuantization(kv_cache=True)
    for count in (4, 3):

        def change(types, config, other, count=count):
            for name in scales[:count]:
                del types[name]

        checkpoint = open_checkpoint(written(tmp_path / str(count), change, quantization=how))
        assert checkpoint.config.quantization.kv_cache == ("cast" if count == 4 else "scaled")
        if count == 4:
            cast = checkpoint.config.quantization
            assert not any("k_scale" in spec.name for spec in plan_load(checkpoint, Stage()).specs)
            continue
        with pytest.raises(CheckpointError) as caught:
            plan_load(checkpoint, Stage())
        assert [name for name in scales if name in "".join(caught.value.problems)] == scales[:3]
    scaled = open_checkpoint(tmp_path / "4" / "whole").config.quantization
    assert scaled.differences(cast) == ["it has an FP8 cache with scales, expected an FP8 cache without scales"]


def test_a_quantised_head_of_a_tied_model_is_refused_by_what_it_is(tmp_path):
    def change(types, config, other):
        config["tie_word_embeddings"] = True

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(written(tmp_path, change, quantization=ZooQuantization(head=True)))
    assert [problem for problem in caught.value.problems if "tie_word_embeddings is true" in problem]
    assert len(caught.value.problems) == 1


def test_a_wrapped_config_may_say_it_twice(tmp_path):
    def change(types, config, other):
        config["text_config"]["quantization_config"] = config["quantization_config"]

    directory = written(tmp_path, change, name="qwen3_5-wrapped")
    assert open_checkpoint(directory).config.quantization == open_checkpoint(tmp_path / "whole").config.quantization

    def differ(types, config, other):
        config["text_config"]["quantization_config"] = config["quantization_config"] | {"quant_algo": "FP8"}

    with pytest.raises(CheckpointError, match="quantization_config"):
        open_checkpoint(written(tmp_path / "b", differ, name="qwen3_5-wrapped"))


def test_codes_without_a_document_are_never_a_plain_model(tmp_path):
    def change(types, config, other):
        del config["quantization_config"]
        other.clear()

    with pytest.raises(CheckpointError) as caught:
        plan_load(open_checkpoint(written(tmp_path, change)), Stage())
    assert any("is U8" in problem for problem in caught.value.problems)


def test_a_document_over_plain_weights_is_an_error(tmp_path):
    plain = open_checkpoint(make_checkpoint("qwen3", tmp_path / "p", **block_sizes("qwen3") | SMALL))
    config = plain.config_document | {"quantization_config": inside()}
    directory = write_checkpoint(tmp_path / "q", plain.tensors, plain.read, config=config)
    with pytest.raises(CheckpointError) as caught:
        plan_load(open_checkpoint(directory), Stage())
    assert any("weight_scale_2' is missing" in problem for problem in caught.value.problems)
    assert any("expected U8" in problem for problem in caught.value.problems)


def test_a_router_and_a_draft_that_the_document_forgot_are_plain(tmp_path):
    def change(types, config, other):
        for names in (config["quantization_config"]["ignore"], other["quantization"]["exclude_modules"]):
            names[:] = [name for name in names if not name.endswith("mlp.gate")]
            assert not any("mtp" in name for name in names)

    checkpoint = open_checkpoint(written(tmp_path, change, name="qwen3_5-moe"))
    assert not any(path.startswith("mtp.") for path in checkpoint.config.quantization.table)
    plan = plan_load(checkpoint, Stage(mtp=True))
    assert plan.dtypes["mtp.layers.0.self_attn.q_proj.weight"] == "F32"


def test_inputs_that_are_no_multiple_of_16_cannot_be_quantised_and_say_whose_size_it_is():
    _, problems = resolved(inside(), intermediate_size=100)
    assert len(problems) == 2
    assert "model.layers.0.mlp.down_proj has 100 inputs (intermediate_size)" in problems[0]


@pytest.mark.parametrize("text", [b"[1]", b"{", b'{"a": 1, "a": 2}'])
def test_a_broken_hf_quant_config_is_a_problem_of_the_checkpoint(text, tmp_path):
    directory = make_checkpoint("qwen3", tmp_path / "q", quantization=ZooQuantization(), **block_sizes("qwen3") | SMALL)
    (directory / "hf_quant_config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match="hf_quant_config.json"):
        open_checkpoint(directory)
