"""Tensors in several forms: fused or per expert, spelled with the wrapper's path or without, with the draft or not."""

from __future__ import annotations

from typing import Any

import pytest

from loaders.config import config_from_json
from loaders.expand import expand
from loaders.expert_rules import expert_rules
from loaders.families import family_module
from loaders.spec import ModelConfig, Specs
from loaders.stage import Stage
from loaders.writing.writer import TensorType

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
    found = found if isinstance(found, dict) else dict.fromkeys(found, TensorType("BF16", ()))
    return expand(family_module(config.architecture).RULES, config, stage, found, forms)


def params(specs: Specs) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for spec in specs}


def test_a_parameter_is_the_same_in_either_form() -> None:
    fused, single = specs_of(forms=("fused",)), specs_of(forms=("per expert",))
    assert params(fused) == params(single)
    by_name = {spec.name: spec for spec in fused}
    assert [placement.tensor for placement in by_name[GATE_UP].placements] == [GATE_UP]
    assert (by_name[GATE_UP].shape, by_name[GATE_UP].tensor_shape) == ((3, 2, 6, 8), (3, 12, 8))
    assert by_name[GATE_UP].axes == ("E", "2", "M", "D")
    assert (by_name[DOWN].shape, by_name[DOWN].tensor_shape) == ((3, 8, 6), (3, 8, 6))
    assert len({spec.name: spec for spec in single}[GATE_UP].placements) == 6


def test_the_checkpoint_decides_the_form_of_each_parameter() -> None:
    found = {GATE_UP, *(f"{EXPERTS}{expert}.down_proj.weight" for expert in range(3))}
    by_name = {spec.name: spec for spec in specs_of(found=found)}
    assert [placement.tensor for placement in by_name[GATE_UP].placements] == [GATE_UP]
    assert [placement.expert_id for placement in by_name[DOWN].placements] == [0, 1, 2]


FUSED, TURNED = {GATE_UP: (3, 12, 8), DOWN: (3, 8, 6)}, {GATE_UP: (3, 8, 12), DOWN: (3, 6, 8)}


def forms_of(shapes: dict[str, tuple[int, ...]], *, prefers_transposed: bool = False, **sizes: int) -> dict[str, str]:
    """Form of the first layer's experts, in a table of this preference."""
    prefix = "{text}.layers.{layer}.mlp.experts."
    rules = expert_rules(prefix, prefers_transposed=prefers_transposed, when=lambda config, layer: layer == 0)
    found = {name: TensorType("BF16", shape) for name, shape in shapes.items()}
    specs = expand(rules, config_of(CONFIG | sizes), None, found)
    return {spec.name: specs.rules[spec.placements[0].tensor].form for spec in specs}


@pytest.mark.parametrize("prefers_transposed", [False, True])
def test_shapes_say_which_way_round_fused_experts_are(prefers_transposed: bool) -> None:
    for shapes, form in ((FUSED, "fused"), (TURNED, "fused transposed")):
        assert forms_of(shapes, prefers_transposed=prefers_transposed) == dict.fromkeys(shapes, form)


@pytest.mark.parametrize("prefers_transposed", [False, True])
@pytest.mark.parametrize("width", [4, 8])
def test_a_matrix_that_fits_both_ways_follows_its_sibling(width: int, prefers_transposed: bool) -> None:
    """hidden_size 8: gate_up is square at 4, and down at 8."""
    for form, gate_up, down in (
        ("fused", (3, 2 * width, 8), (3, 8, width)),
        ("fused transposed", (3, 8, 2 * width), (3, width, 8)),
    ):
        found = forms_of(
            {GATE_UP: gate_up, DOWN: down}, prefers_transposed=prefers_transposed, moe_intermediate_size=width
        )
        assert found == {GATE_UP: form, DOWN: form}


@pytest.mark.parametrize(("prefers_transposed", "form"), [(False, "fused"), (True, "fused transposed")])
def test_what_no_shape_tells_is_as_the_family_is_published(prefers_transposed: bool, form: str) -> None:
    per_expert = {f"{EXPERTS}{expert}.down_proj.weight": (8, 4) for expert in range(3)}
    found = forms_of({GATE_UP: (3, 8, 8), **per_expert}, prefers_transposed=prefers_transposed, moe_intermediate_size=4)
    assert found == {GATE_UP: form, DOWN: "per expert"}
    assert forms_of({GATE_UP: (9, 9), DOWN: (9,)}, prefers_transposed=prefers_transposed)[GATE_UP] == form
    assert forms_of({}, prefers_transposed=prefers_transposed)[GATE_UP] == form


def test_the_parameter_is_the_same_whichever_way_round_its_tensor_is() -> None:
    plain, turned = (
        {
            spec.name: spec
            for spec in specs_of(found={name: TensorType("BF16", shape) for name, shape in shapes.items()})
        }
        for shapes in (FUSED, TURNED)
    )
    for name in (GATE_UP, DOWN):
        assert (plain[name].shape, plain[name].axes) == (turned[name].shape, turned[name].axes)
        assert (plain[name].tensor_shape, turned[name].tensor_shape) == (FUSED[name], TURNED[name])
        assert (plain[name].is_transposed, turned[name].is_transposed) == (False, True)


def test_the_text_model_may_be_spelled_with_the_wrappers_path() -> None:
    plain = specs_of()
    spelled = specs_of(found={"model.language_model.norm.weight"})
    assert params(spelled) == params(plain)
    assert all(
        placement.tensor.startswith(("model.language_model.", "lm_head."))
        for s in spelled
        for placement in s.placements
    )
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
