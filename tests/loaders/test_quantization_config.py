"""Quantisation documents, in every spelling that is about, and every one that is wrong."""

import pytest
import torch
from compressed_tensors.utils import match_targets
from recipes import (
    ATTENTION,
    CT,
    FOUR,
    FP8,
    GATE_UP,
    QKV,
    W4A4,
    W4A16,
    beside,
    compressed,
    excluded,
    inside,
    mixed,
    problems_of,
    resolved,
)

from loaders.quantization.documents import read_recipes
from loaders.quantization.patterns import patterns
from loaders.quantization.schemes import Scheme

# --- names, in all their spellings ---


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["lm_head"], ["lm_head"]),
        (["model.layers.0.self_attn.q_proj"], ATTENTION[2:3]),
        (["model.layers.0.self_attn"], ATTENTION),
        (["model.layers.0.self_attn*"], ATTENTION),
        (["model.layers.0.self_attn.*"], ATTENTION),
        (["*layers.0.self_attn*"], ATTENTION),
        (["re:.*layers\\.0\\.self_attn.*"], ATTENTION),
        (["re:model.layers.0.self_attn"], ATTENTION),
        (["re:.*layers\\.0\\..*(qkv_proj|o_proj)$"], ATTENTION),
        (["re:(?i)MODEL.layers.0.SELF_attn", "re:.*(down)_proj\\1"], ATTENTION),
        (["model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn.o_proj"], ATTENTION),
        (["model.layers.0.self_attn.qkv_proj*"], sorted({*ATTENTION} - {ATTENTION[1]})),
        (["model.layers.0.mlp.gate_up_proj"], ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]),
        (["model.language_model.layers.0.self_attn"], ATTENTION),
        (["language_model.model.layers.0.self_attn"], ATTENTION),
        (["language_model.layers.0.self_attn*"], ATTENTION),
        (["self_attn.q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ([r"re:.*layers\.0\..*\b(qkv_proj|o_proj)$"], ATTENTION),
        ([r"re:.*layers\.0\..*\bqkv_proj$"], sorted({*ATTENTION} - {ATTENTION[1]})),
        (["re:.*layers.0.*(qkv_proj|gate_up_proj)$"], [*QKV, *GATE_UP]),
        (["*layers.0.*.qkv_proj", "*layers.0.*.gate_up_proj.*"], [*QKV, *GATE_UP]),
        (["model.layers.0.self_attn.qkv_proj.*"], QKV),
        (["re:.*layers.0.mlp.gate.*"], GATE_UP[:1]),  # and not up_proj, though gate_up_proj would match
        (["layers.0.self_attn*"], ATTENTION),
        (["layers.0.self_attn.*"], ATTENTION),
        (["model.layers.0.self_attn.q_pro?"], ATTENTION[2:3]),
        (["model.layers.0.self_attn.[kq]_proj"], [ATTENTION[0], ATTENTION[2]]),
        (["model.layers.0.self_att"], []),
        (["re:self_attn.q_proj"], []),  # it must match from the beginning on
        (["model.layers.00.self_attn"], []),
        (["model.embed_tokens", "visual*", "re:.*vision.*"], []),
    ],
)
def test_modules_are_left_alone_in_every_spelling(names, expected):
    assert excluded(names) == sorted(expected)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.experts*",
        "model.layers.0.mlp.experts.*",
        "model.layers.0.mlp.experts.*.*_proj",
        "re:.*layers.0.mlp.experts.*",
        "re:.*layers.0.mlp.experts.\\d+.(gate|up|down)_proj$",
    ],
)
def test_experts_are_left_alone_by_one_name_or_by_all(name):
    assert excluded([name], name="qwen3-moe") == ["model.layers.0.mlp.experts"]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.*.down_proj",
        "model.layers.0.mlp.experts.0.gate_proj",
        "model.layers.0.mlp.experts.1.gate_proj",
        "*layers.0.mlp.experts.2*",
        r"re:.*layers\.0\.mlp\.experts\.[1-2]\..*",
    ],
)
def test_some_experts_or_projections_of_them_cannot_be_left_alone(name):
    _, problems = resolved(inside(ignore=[name]), name="qwen3-moe")
    (problem,) = problems
    assert "projections of model.layers.0.mlp.experts are" in problem
    assert "not quantised" in problem
    assert str(W4A4) in problem


def test_fused_names_of_linear_attention_are_expanded():
    linear = "model.layers.0.linear_attn."
    assert excluded([f"{linear}in_proj_qkvz"], name="qwen3_5") == [f"{linear}in_proj_qkv", f"{linear}in_proj_z"]
    assert excluded([f"{linear}in_proj_ba"], name="qwen3_5") == [f"{linear}in_proj_a", f"{linear}in_proj_b"]
    assert excluded([f"{linear}in_proj_qkv"], name="qwen3_5") == [f"{linear}in_proj_qkv"]


@pytest.mark.parametrize("name", ["qwen3_5-wrapped", "qwen3_5-moe-wrapped"])
@pytest.mark.parametrize("path", ["model", "model.language_model", "language_model.model", "language_model"])
def test_a_wrapped_model_is_named_by_any_of_its_paths(name, path):
    found = excluded([f"{path}.layers.1.self_attn*"], name=name)
    assert found == [f"model.language_model.layers.1.self_attn.{one}_proj" for one in "koqv"]


def test_compressed_tensors_names_are_whole_names():
    table, problems = resolved(compressed(ignore=["lm_head", "self_attn.q_proj", "model.layers.0.mlp"]))
    assert problems == []
    assert len(table) == 14


def test_a_router_that_nobody_excluded_is_not_quantised_all_the_same():
    table, problems = resolved(inside(), name="qwen3-moe")
    assert problems == []
    assert not any(path.endswith("mlp.gate") for path in table)
    assert "model.layers.0.mlp.experts" in table


def test_a_regular_expression_keeps_its_own_flags_and_groups():
    matches = patterns(["re:(a)x", "re:(?i)(B)\\1"])
    assert matches(["bB"])
    assert not matches(["ba"])
    assert not matches(["AX"])


# --- ModelOpt ---


def test_hf_quant_config_alone_is_enough():
    table, problems = resolved(None, beside())
    assert problems == []
    assert set(table.values()) == {W4A4}
    assert "lm_head" not in table


@pytest.mark.parametrize("method", ["modelopt", "modelopt_fp4", "modelopt_mixed"])
def test_engines_names_of_modelopt_are_known(method):
    assert problems_of(inside(quant_method=method)) == []


def test_a_nested_document_in_config_json_is_read():
    table, problems = resolved({"quant_method": "modelopt", **beside()})
    assert problems == []
    assert set(table.values()) == {W4A4}


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4"])
@pytest.mark.parametrize("absent", [{}, {"input_activations": None}])
def test_nvfp4_whose_groups_have_no_inputs_is_weight_only(algorithm, absent):
    document = inside(algorithm, config_groups={"group_0": {"weights": FOUR, "targets": ["Linear"], **absent}})
    assert set(resolved(document)[0].values()) == {W4A16}
    assert set(resolved(document, beside("NVFP4"))[0].values()) == {W4A16}


def test_kv_scales_are_found_in_either_spelling():
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    for document, other in (
        (inside(kv_cache_scheme=scheme), None),
        (inside(kv_cache_scheme="FP8"), None),
        (inside(kv_cache_quant_algo=None, kv_cache_scheme=scheme), None),
        (None, beside(kv_cache_quant_algo="FP8")),
        (inside(kv_cache_scheme=scheme), beside(kv_cache_quant_algo="FP8")),
    ):
        recipes, problems = read_recipes(document, other)
        assert problems == []
        assert all(recipe.kv_cache for recipe in recipes.values())


def test_documents_that_mean_the_same_may_say_it_in_other_words():
    names = ["lm_head", "model.layers.0.self_attn*"]
    expected, problems = resolved(inside(ignore=names))
    assert problems == []
    for other in (names[::-1], ["lm_head", "model.layers.0.self_attn"], ["lm_head", *ATTENTION, "visual*"]):
        assert resolved(inside(ignore=names), beside(exclude_modules=other)) == (expected, [])
    listed = {module: {"quant_algo": "NVFP4", "group_size": 16} for module in expected}
    assert resolved(mixed(listed), beside(exclude_modules=names)) == (expected, [])


def test_a_document_of_the_other_exporter_may_lie_beside_and_the_words_are_those_of_config_json():
    # compressed_tensors.entrypoints.convert.convert_checkpoint copies hf_quant_config.json along
    group = {"targets": [r"re:.*mlp.*\.(gate|up|down)_proj$", r"re:.*self_attn\.[qkvo]_proj$"]}
    table, problems = resolved(compressed(group), beside())
    assert problems == []
    assert set(table.values()) == {Scheme("nvfp4", True, "compressed-tensors")}
    assert table == resolved(compressed(group))[0]
    assert len(resolved(compressed(group), beside("FP8"))[1]) == 1


# --- mixed recipes ---


def test_the_table_of_a_mixed_recipe_decides_whatever_its_groups_say():
    layers = {f"model.layers.{layer}.mlp": {"quant_algo": "W4A16_NVFP4", "group_size": 16} for layer in (0, 1)}
    layers |= {name: {"quant_algo": "FP8"} for name in ATTENTION}
    table, problems = resolved(mixed(layers))  # the group says that inputs are quantised, and means every Linear
    assert problems == []
    assert table["model.layers.1.mlp.down_proj"] == W4A16
    assert table[ATTENTION[0]] == FP8
    assert "model.layers.1.self_attn.q_proj" not in table
    assert "lm_head" not in table


def test_a_mixed_recipe_may_name_fused_layers_and_other_paths():
    layers = {"language_model.layers.0.self_attn.qkv_proj": {"quant_algo": "FP8"}, "lm_head": {"quant_algo": "NVFP4"}}
    table, problems = resolved(mixed(layers))
    assert problems == []
    assert table == {"lm_head": W4A4} | dict.fromkeys([one for one in ATTENTION if "o_proj" not in one], FP8)


@pytest.mark.parametrize("turned", [False, True])
def test_the_longest_name_of_a_mixed_recipe_decides_in_whatever_order_it_stands(turned):
    layers = {
        "model.layers.*": {"quant_algo": "W4A16_NVFP4"},
        "model.layers.0.mlp": {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.0.mlp.down_proj": {"quant_algo": "FP8"},
    }
    table, problems = resolved(mixed(dict(reversed(layers.items())) if turned else layers))
    assert problems == []
    expected = {"model.layers.0.mlp.up_proj": W4A4, "model.layers.0.mlp.down_proj": FP8, ATTENTION[0]: W4A16}
    assert {module: table[module] for module in expected} == expected


def test_what_a_mixed_recipe_excludes_is_left_alone():
    table, _ = resolved(mixed({"lm_head": {"quant_algo": "NVFP4"}}) | {"ignore": ["lm_head"]})
    assert table == {}


# --- compressed-tensors ---


def test_compressed_tensors_without_inputs_is_weight_only():
    assert set(resolved(compressed({"input_activations": None}))[0].values()) == {
        Scheme("nvfp4", False, "compressed-tensors")
    }


def test_a_group_that_names_modules_goes_before_one_that_means_all():
    only = {"weights": CT, "input_activations": None, "targets": ["re:.*down_proj$"]}
    document = compressed()
    document["config_groups"]["group_1"] = only
    table, problems = resolved(document)
    assert problems == []
    assert not table["model.layers.0.mlp.down_proj"].activations
    assert table["model.layers.0.mlp.up_proj"].activations


@pytest.mark.parametrize("turned", [False, True])
def test_exact_names_go_before_regular_expressions_and_those_before_the_class(turned):
    """As compressed-tensors' own ``match_targets`` orders what matches."""
    groups = {
        "a": {"weights": CT, "input_activations": None, "targets": ["Linear", "model.layers.0.mlp.down_proj"]},
        "b": {"weights": CT, "input_activations": CT | {"dynamic": "local"}, "targets": ["re:.*mlp.*"]},
    }
    groups = dict(reversed(groups.items())) if turned else groups
    table, problems = resolved(compressed(config_groups=groups))
    assert problems == []
    targets = [target for group in groups.values() for target in group["targets"]]
    for module, scheme in table.items():
        first = match_targets(module, torch.nn.Linear(1, 1), targets)[0]
        assert scheme.activations == (first == "re:.*mlp.*"), module
    assert not table["model.layers.0.mlp.down_proj"].activations
    assert table["model.layers.1.mlp.down_proj"].activations


@pytest.mark.parametrize("stored", ["{expert}.{name}_proj.weight", "{name}"])
def test_experts_that_are_plain_though_all_linears_are_meant_are_plain(stored):
    """transformers keeps experts in tensors of a class of their own: Linear does not mean them, nor does ignore."""
    of = "model.layers.1.mlp.experts."
    names = ("gate", "up", "down") if "expert" in stored else ("gate_up_proj", "down_proj")
    found = {of + stored.format(expert=expert, name=name) for expert in range(2) for name in names}
    table, problems = resolved(compressed(), name="qwen3_5-moe", found=found)
    assert problems == []
    assert "model.layers.1.mlp.experts" not in table
    assert "model.layers.0.mlp.experts" in table  # of which nothing is there: its tensors will be missing
    assert "model.layers.1.self_attn.q_proj" in table
    named = compressed({"targets": ["Linear", "re:.*experts.*"]})  # then scales are missing
    assert "model.layers.1.mlp.experts" in resolved(named, name="qwen3_5-moe", found=found)[0]
    assert "model.layers.1.mlp.experts" in resolved(inside(), name="qwen3_5-moe", found=found)[0]
    some = found | {f"{of}0.up_proj.weight_packed", f"{of}0.up_proj.weight_scale"}
    (problem,) = resolved(compressed(), name="qwen3_5-moe", found=some - {f"{of}0.up_proj.weight"})[1]
    assert "One scheme for all" in problem


@pytest.mark.parametrize("value", [{}, {"format": "dense", "targets": []}, None])
def test_sparsity_that_is_none_is_accepted(value):
    assert problems_of(compressed(sparsity_config=value)) == []
