"""Tensors in several forms: fused or per expert, spelled with the wrapper's path or without, with the draft or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loaders.config import config_from_json
from loaders.expand import expand
from loaders.families import family_module
from loaders.plan import load_fused_expert_weights, weight_loader
from loaders.spec import ModelConfig, Specs
from loaders.stage import Stage

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 3,
    "linear_key_head_dim": 2,
    "linear_value_head_dim": 5,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "shared_expert_intermediate_size": 7,
}
EXPERTS = "model.layers.0.mlp.experts."
GATE_UP, DOWN = EXPERTS + "gate_up_proj", EXPERTS + "down_proj"


def config_of(document: dict[str, Any] = CONFIG) -> ModelConfig:
    config, problems = config_from_json(document)
    assert problems == []
    assert config is not None
    return config


def specs_of(stage: Stage | None = None, found: Any = (), forms: Any = (), document: Any = CONFIG) -> Specs:
    config = config_of(document)
    return expand(family_module(config.architecture).RULES, config, stage, found, forms)


def params(specs: Specs) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for spec in specs}


def test_a_parameter_is_the_same_in_either_form() -> None:
    fused, single = specs_of(forms=("fused",)), specs_of(forms=("per expert",))
    assert params(fused) == params(single)
    by_name = {spec.name: spec for spec in fused}
    assert [source.tensor for source in by_name[GATE_UP].sources] == [GATE_UP]
    assert (by_name[GATE_UP].shape, by_name[GATE_UP].tensor_shape) == ((3, 2, 6, 8), (3, 12, 8))
    assert by_name[GATE_UP].axes == ("E", "2", "M", "D")
    assert (by_name[DOWN].shape, by_name[DOWN].tensor_shape) == ((3, 8, 6), (3, 8, 6))
    assert len({spec.name: spec for spec in single}[GATE_UP].sources) == 6


def test_the_checkpoint_decides_the_form_of_each_parameter() -> None:
    found = {GATE_UP, *(f"{EXPERTS}{expert}.down_proj.weight" for expert in range(3))}
    by_name = {spec.name: spec for spec in specs_of(found=found)}
    assert [source.tensor for source in by_name[GATE_UP].sources] == [GATE_UP]
    assert [source.expert_id for source in by_name[DOWN].sources] == [0, 1, 2]


def test_the_text_model_may_be_spelled_with_the_wrappers_path() -> None:
    plain = specs_of()
    spelled = specs_of(found={"model.language_model.norm.weight"})
    assert params(spelled) == params(plain)
    assert all(source.tensor.startswith(("model.language_model.", "lm_head.")) for s in spelled for source in s.sources)
    wrapped = specs_of(document={"architectures": ["Qwen3_5MoeForConditionalGeneration"], "text_config": CONFIG})
    assert set(params(wrapped)) == {name.replace("model.", "model.language_model.", 1) for name in params(plain)}


def test_the_draft_is_on_the_last_stage_with_a_copy_of_the_embedding() -> None:
    first, last = (specs_of(Stage(index, 2, mtp=True)) for index in (0, 1))
    drafts = {name for name in params(last) if name.startswith("mtp.")}
    assert drafts == {name for name in params(specs_of(Stage(mtp=True))) if name.startswith("mtp.")}
    assert "mtp.layers.0.mlp.experts.gate_up_proj" in drafts
    assert not [name for name in params(first) if name.startswith("mtp.")]
    assert first.embedding == last.embedding == "model.embed_tokens.weight"
    assert specs_of(Stage(1, 2)).embedding is None  # without a draft it has no use for one


def test_fused_experts_are_written_one_by_one_gate_first() -> None:
    rng = np.random.default_rng(0)
    fused = rng.standard_normal((3, 12, 8)).astype(np.float32)
    param = np.full((3, 2, 6, 8), np.nan, np.float32)
    load_fused_expert_weights(param, fused, num_shards=2)
    expected = np.empty_like(param)
    for expert in range(3):
        for shard in range(2):
            weight_loader(expected, fused[expert, shard * 6 : shard * 6 + 6], shard_id=shard, expert_id=expert)
    np.testing.assert_array_equal(param, expected)
    np.testing.assert_array_equal(param.reshape(fused.shape), fused)  # so it may be read straight into place


@pytest.mark.parametrize("shape", [(2, 12, 8), (3, 11, 8), (3, 12, 7)])
def test_fused_experts_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        load_fused_expert_weights(np.zeros((3, 2, 6, 8), np.float32), np.zeros(shape, np.float32), num_shards=2)


def test_ids_by_position_are_a_type_error() -> None:
    with pytest.raises(TypeError):
        load_fused_expert_weights(np.zeros((3, 2, 6, 8)), np.zeros((3, 12, 8)), 2)  # pyright: ignore[reportCallIssue]
