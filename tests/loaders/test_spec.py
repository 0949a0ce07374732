"""Rules as data: every tensor has one place, every stage its own, and reading a place is writing's inverse."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from handmade import CONFIG, MOE_CONFIG

from loaders.config import config_from_json
from loaders.expand import expand
from loaders.families import FAMILIES, family_module
from loaders.qwen3 import RULES, Qwen3Config
from loaders.spec import ParamSpec, Placement, Rule, Specs, TiedSpec
from loaders.stage import Stage

LAYER = [
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "post_attention_layernorm.weight",
]
DENSE_MLP = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]
SPARSE_MLP = ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def config_of(document: dict[str, Any], **changes: Any) -> Qwen3Config:
    config, problems = config_from_json(document | changes)
    assert problems == []
    assert isinstance(config, Qwen3Config)
    return config


def names(specs: Specs) -> set[str]:
    return {spec.name for spec in specs}


def under(layer: int, names: list[str]) -> set[str]:
    return {f"model.layers.{layer}.{name}" for name in names}


def test_a_dense_model_has_these_parameters_and_no_others() -> None:
    specs = expand(RULES, config_of(CONFIG))
    assert names(specs) == {EMBED, HEAD, NORM} | under(0, LAYER + DENSE_MLP) | under(1, LAYER + DENSE_MLP)
    assert all(spec.placements == (Placement(spec.name),) for spec in specs)  # parameters keep the checkpoint's names
    shapes = {spec.name: (spec.axes, spec.shape) for spec in specs}
    assert shapes[EMBED] == (("V", "D"), (11, 8))
    assert shapes["model.layers.1.self_attn.q_proj.weight"] == (("NH", "D"), (8, 8))
    assert shapes["model.layers.1.self_attn.k_proj.weight"] == (("KH", "D"), (4, 8))
    assert shapes["model.layers.1.self_attn.o_proj.weight"] == (("D", "NH"), (8, 8))
    assert shapes["model.layers.1.self_attn.q_norm.weight"] == (("H",), (4,))
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (("D", "F"), (8, 12))
    assert shapes[HEAD] == (("V", "D"), (11, 8))


def test_biases_exist_only_where_the_config_asks_for_them() -> None:
    plain, biased = (names(expand(RULES, config_of(CONFIG, attention_bias=bias))) for bias in (False, True))
    assert biased - plain == {
        f"model.layers.{layer}.self_attn.{letter}_proj.bias" for layer in (0, 1) for letter in "qkvo"
    }


def test_a_sparse_layer_stacks_experts_then_gate_and_up() -> None:
    specs = {spec.name: spec for spec in expand(RULES, config_of(MOE_CONFIG, mlp_only_layers=[0]))}
    assert set(specs) == {EMBED, HEAD, NORM} | under(0, LAYER + DENSE_MLP) | under(1, LAYER + SPARSE_MLP)
    experts = "model.layers.1.mlp.experts"
    gate_up = specs[f"{experts}.gate_up_proj"]
    assert (gate_up.axes, gate_up.shape, gate_up.tensor_shape) == (("E", "2", "M", "D"), (3, 2, 6, 8), (6, 8))
    assert {placement.tensor: placement.index for placement in gate_up.placements} == {
        f"{experts}.{expert}.{name}_proj.weight": (expert, shard)
        for expert in range(3)
        for shard, name in enumerate(("gate", "up"))
    }
    down = specs[f"{experts}.down_proj"]
    assert (down.axes, down.shape, down.tensor_shape) == (("E", "D", "M"), (3, 8, 6), (8, 6))
    assert [placement.index for placement in down.placements] == [(0,), (1,), (2,)]


CONFIGS = {
    "dense": config_of(CONFIG),
    "dense tied": config_of(CONFIG, tie_word_embeddings=True),
    "dense biased": config_of(CONFIG, attention_bias=True),
    "deep": config_of(CONFIG, num_hidden_layers=13),
    "sparse": config_of(MOE_CONFIG, num_hidden_layers=4),
    "sparse tied": config_of(MOE_CONFIG, num_hidden_layers=5, tie_word_embeddings=True, decoder_sparse_step=2),
    "sparse mixed": config_of(MOE_CONFIG, num_hidden_layers=4, mlp_only_layers=[1, 2]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_every_place_of_every_parameter_has_exactly_one_tensor(case: str) -> None:
    specs = expand(RULES, CONFIGS[case])
    tensors = Counter(placement.tensor for spec in specs for placement in spec.placements)
    assert set(tensors.values()) == {1}
    assert len(names(specs)) == len(specs.params)
    for spec in specs:
        taken = np.zeros(spec.shape, np.int64)
        for placement in spec.placements:
            assert taken[placement.index].shape == spec.tensor_shape
            taken[placement.index] += 1
        assert (taken == 1).all()


@pytest.mark.parametrize("case", CONFIGS)
def test_what_is_written_to_its_places_is_read_back_from_them(case: str) -> None:
    for spec in expand(RULES, CONFIGS[case]):
        stack = np.zeros(spec.shape)
        for number, placement in enumerate(spec.placements, 1):
            stack[placement.index] = number
        read_back = [float(np.unique(stack[placement.index]).item()) for placement in spec.placements]
        assert read_back == list(range(1, len(spec.placements) + 1))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("case", ["deep", "sparse", "sparse tied", "sparse mixed"])
def test_the_stages_together_are_the_whole_model_and_share_only_a_tied_embedding(case: str, count: int) -> None:
    config = CONFIGS[case]
    whole = {spec.name: spec for spec in expand(RULES, config)}
    stages = [expand(RULES, config, Stage(index, count)) for index in range(count)]
    held = Counter(spec.name for stage in stages for spec in stage)
    assert set(held) == set(whole)
    twice = {name for name, times in held.items() if times > 1}
    assert twice == ({EMBED} if config.tie_word_embeddings and count > 1 else set())
    assert all(whole[spec.name] == spec for stage in stages for spec in stage)
    for stage, specs in enumerate(stages):
        layers = {int(name.split(".")[2]) for name in names(specs) if name.startswith("model.layers.")}
        assert layers == set(Stage(stage, count).layers(config.num_hidden_layers))
        assert (NORM in names(specs)) == (stage == count - 1)
        assert (HEAD in names(specs)) == (stage == count - 1 and not config.tie_word_embeddings)
        assert (EMBED in names(specs)) == (stage == 0 or (stage == count - 1 and config.tie_word_embeddings))


@pytest.mark.parametrize("count", [1, 2])
def test_a_tied_head_is_no_parameter_but_known_on_the_last_stage(count: int) -> None:
    config = CONFIGS["dense tied"]
    *others, last = [expand(RULES, config, Stage(index, count)) for index in range(count)]
    assert last.tied == (TiedSpec(HEAD, EMBED, (11, 8)),)
    assert HEAD in last.tensors()
    assert HEAD not in names(last)
    assert EMBED in names(last)
    assert all(other.tied == () and HEAD not in other.tensors() for other in others)
    assert expand(RULES, CONFIGS["dense"]).tied == ()


def test_an_axis_says_which_config_keys_fix_it() -> None:
    origins = expand(RULES, CONFIGS["sparse"]).origins
    assert origins["NH"] == "num_attention_heads=2, head_dim=4"
    assert origins["KH"] == "num_key_value_heads=1, head_dim=4"
    assert origins["M"] == "moe_intermediate_size"


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_every_family_offers_what_shared_code_reads(architecture: str) -> None:
    family = family_module(architecture)
    assert all(isinstance(rule, Rule) for rule in family.RULES)
    assert all(pattern.pattern for pattern in family.LEFT_OUT)
    assert callable(family.config_from_json)


def test_a_parameter_without_stacks_is_its_tensor() -> None:
    spec = ParamSpec("w", (3, 4), ("V", "D"), (Placement("w"),), (3, 4))
    assert spec.placements[0].index == ()
    assert spec.tensor_shape == (3, 4)


# Stages


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        (4, 1, [range(4)]),
        (4, 2, [range(2), range(2, 4)]),
        (5, 2, [range(3), range(3, 5)]),
        (7, 3, [range(3), range(3, 5), range(5, 7)]),
        (3, 3, [range(1), range(1, 2), range(2, 3)]),
    ],
)
def test_layers_are_dealt_out_in_order_and_early_stages_take_the_rest(
    layers: int, count: int, expected: list[range]
) -> None:
    assert [Stage(index, count).layers(layers) for index in range(count)] == expected


def test_a_stage_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="4 pipeline stages for 3 decoder layers: at least one would be empty"):
        expand(RULES, config_of(CONFIG, num_hidden_layers=3), Stage(0, 4))


@pytest.mark.parametrize("stage", [(1, 1), (-1, 2), (0, 0), (0.0, 1), (True, 2), ("0", 1)])
def test_a_stage_that_does_not_exist_is_refused(stage: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="must be \\(index, count\\) with 0 <= index < count"):
        Stage.of(stage)


@pytest.mark.parametrize("stage", [0, 1, "01", (), (1,), (0, 2, True), {0: 2, 1: 2}, False])
def test_what_is_no_pair_is_no_stage_and_not_the_whole_model(stage: Any) -> None:
    with pytest.raises(ValueError, match="expected \\(index, count\\) of a pipeline, or None for the whole model"):
        Stage.of(stage)


def test_a_stage_is_given_as_a_pair_or_not_at_all() -> None:
    assert Stage.of(None) == Stage(0, 1)
    assert Stage.of((1, 2)) == Stage.of(Stage(1, 2)) == Stage(1, 2)
