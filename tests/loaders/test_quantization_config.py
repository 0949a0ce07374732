"""Quantisation documents, in every spelling that is about, and every one that is wrong."""

import json

import pytest
import torch
from compressed_tensors.utils import match_targets

from loaders import CheckpointError, open_checkpoint
from loaders.config import config_from_json
from loaders.plan import plan_load
from loaders.quantization import Scheme
from loaders.quantization_config import read_recipes
from loaders.quantization_patterns import patterns
from loaders.stage import Stage
from loaders.writer import write_checkpoint
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint, zoo_config

FOUR = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
CT = {**FOUR, "strategy": "tensor_group", "symmetric": True}
W4A4, W4A16 = Scheme("nvfp4", True), Scheme("nvfp4", False)
FP8 = Scheme("fp8", True)
SMALL = {"num_hidden_layers": 2}
HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


def inside(algorithm="NVFP4", **changes):
    group = {"input_activations": FOUR, "weights": FOUR, "targets": ["Linear"]}
    groups = {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    return groups | {"quant_algo": algorithm, "quant_method": "modelopt"} | changes


def beside(algorithm="NVFP4", **changes):
    said = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}
    return {"producer": {"name": "modelopt"}, "quantization": said | changes}


def compressed(group=None, **changes):
    own = {"weights": CT, "input_activations": CT | {"dynamic": "local"}, "targets": ["Linear"]} | (group or {})
    document = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["lm_head"]}
    return document | {"config_groups": {"group_0": own}} | changes


def mixed(layers, **changes):
    return inside("MIXED_PRECISION", quantized_layers=layers, ignore=[], **changes)


def resolved(document, beside=None, *, name="qwen3", found=(), **sizes):
    """The table of schemes that documents mean for a zoo model of the tensors ``found``, and problems."""
    sizes = block_sizes(name) | (HYBRID if "qwen3_5" in name else SMALL) | sizes
    config_document = zoo_config(name, **sizes) | ({} if document is None else {"quantization_config": document})
    config, problems = config_from_json(config_document, beside=beside, found=found)
    return ({} if config is None or config.quantization is None else config.quantization.table), problems


def excluded(names, **options):
    """Modules of a zoo model that a list of names leaves alone."""
    found, problems = resolved(inside(ignore=names), **options)
    assert problems == []
    return sorted(resolved(inside(ignore=[]), **options)[0].keys() - found.keys())


def problems_of(document, beside=None):
    recipes, problems = read_recipes(document, beside)
    assert (not recipes) == (bool(problems) or (document is None and beside is None))
    return problems


ATTENTION = [f"model.layers.0.self_attn.{name}" for name in ("k_proj", "o_proj", "q_proj", "v_proj")]


QKV = [f"model.layers.0.self_attn.{name}_proj" for name in "kqv"]
GATE_UP = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]


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


@pytest.mark.parametrize(
    "scheme",
    [
        "NVFP4",
        "INT8",
        {"num_bits": 8, "type": "int", "dynamic": False},
        {"num_bits": 8, "type": "float", "dynamic": True},
    ]
    + [{}, [], 8],
)
def test_other_kv_schemes_are_refused_by_name(scheme):
    assert "KV cache scheme" in problems_of(inside(kv_cache_scheme=scheme))[0]


@pytest.mark.parametrize(
    "algorithm",
    ["NVFP4_AWQ", "NVFP4_SVD", "W4A8_NVFP4_FP8", "W4A8_MXFP4_FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8"]
    + ["W4A16_AWQ", "nvfp4", "", None, 4, ["NVFP4"], {"NVFP4": 1}],
)
def test_an_algorithm_that_is_not_implemented_is_an_error_and_never_a_plain_model(algorithm):
    for found in (problems_of(inside(algorithm)), problems_of(None, beside(algorithm))):
        assert any("quant_algo" in problem and "is not implemented" in problem for problem in found)
    layers = {"model.layers.0.mlp.up_proj": {"quant_algo": algorithm}}
    assert any("is not implemented" in problem for problem in problems_of(mixed(layers)))


@pytest.mark.parametrize("size", [32, 128, "16", 0, [16]])
def test_blocks_of_another_size_are_refused_wherever_they_are_said(size):
    groups = {"group_0": {"weights": FOUR | {"group_size": size}, "targets": ["Linear"], "input_activations": FOUR}}
    for document, other in (
        (inside(group_size=size), None),
        (inside(config_groups=groups), None),
        (None, beside(group_size=size)),
        (compressed({"weights": CT | {"group_size": size}}), None),
    ):
        assert any("group_size is" in problem for problem in problems_of(document, other))


def test_documents_that_disagree_are_refused():
    def told(document, other):
        (problem,) = resolved(document, other)[1]
        assert problem.endswith("Which one is meant?")
        return problem

    both = "by config.json: quantization_config (and 13 more)"
    assert f"hf_quant_config.json: model.layers.0.mlp.down_proj is {FP8}, expected {W4A4} {both}" in told(
        inside(), beside("FP8")
    )
    assert "an FP8 cache with scales" in told(inside(kv_cache_scheme="FP8"), beside())
    other = beside(exclude_modules=["lm_head", ATTENTION[0]])
    assert f"hf_quant_config.json: {ATTENTION[0]} is not quantised, expected {W4A4}" in told(inside(), other)
    a, b = ({ATTENTION[0]: {"quant_algo": one}, ATTENTION[1]: {"quant_algo": "FP8"}} for one in ("FP8", "NVFP4"))
    other = beside("MIXED_PRECISION", quantized_layers=b, exclude_modules=[])
    assert f"{ATTENTION[0]} is {W4A4}, expected {FP8}" in told(mixed(a), other)


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


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (compressed({"weights": CT | {"strategy": "channel"}}), "strategy is 'channel'"),
        (compressed({"weights": CT | {"num_bits": 8}}), "num_bits is 8"),
        (compressed({"weights": CT | {"type": "int"}}), "type is 'int'"),
        (compressed({"weights": CT | {"symmetric": False}}), "symmetric is False"),
        (compressed({"weights": CT | {"dynamic": True}}), "dynamic is True"),
        (compressed({"input_activations": CT | {"dynamic": True}}), "dynamic is True"),
        (compressed({"input_activations": CT}), "dynamic is False"),
        (compressed({"input_activations": CT | {"dynamic": "local", "num_bits": 8}}), "num_bits is 8"),
        (compressed({"output_activations": CT}), "output_activations"),
        (compressed({"targets": []}), "targets is []"),
        (compressed({"targets": None}), "targets is None"),
        (compressed({"targets": "Linear"}), "targets is 'Linear'"),
        (compressed(format="float-quantized"), "format 'float-quantized'"),
        (compressed({"format": "pack-quantized"}), "format 'pack-quantized'"),
        (compressed(format=None), "format None"),
        (compressed(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (compressed(transform_config={"config_groups": {}}), "transform_config"),
        (compressed(quantization_status="frozen"), "quantization_status"),
    ],
)
def test_what_compressed_tensors_can_say_and_is_not_implemented_is_refused_by_name(document, words):
    found = problems_of(document)
    assert len(found) == 1
    assert words in found[0]


# --- documents that are no such thing ---


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes", "modelopt_fp8", None, 3, ["modelopt"]])
def test_a_method_that_is_unknown_is_an_error(method):
    assert "quant_method" in problems_of(inside(quant_method=method))[0]


ODD = (None, [], {}, "x", 3, True, [1], {"a": 1}, [[]], {"a": []}, {"a": {"weights": 3}}, ["re:("], ["re:(?i)x", "["])
KEYS = ("config_groups", "ignore", "exclude_modules", "quant_algo", "kv_cache_scheme", "quantized_layers", "group_size")
KEYS += ("quantization", "format", "sparsity_config", "quantization_status", "quant_method", "kv_cache_quant_algo")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", ODD, ids=repr)
def test_whatever_stands_under_a_key_is_read_or_refused_and_never_crashes(key, value):
    layers = {"a": {"quant_algo": "NVFP4"}}
    for document in (inside(), compressed(), mixed(layers), {"quant_method": "modelopt", **beside()}):
        problems_of(document | {key: value})
        problems_of(document | {key: value}, beside())
        resolved(document | {key: value}, beside())
    problems_of(None, {"quantization": beside()["quantization"] | {key: value}})
    problems_of(None, beside() | {key: value})
    problems_of(None, value)
    problems_of(value, None)


@pytest.mark.parametrize(
    "layers", [{"a": {"quant_algo": "FP8"}, "re:(": {"quant_algo": "FP8"}}, {}, {"a": 1}, [], None]
)
def test_a_table_of_layers_that_is_none_is_refused(layers):
    assert "quantized_layers" in problems_of(mixed(layers))[0]


@pytest.mark.parametrize("group", [3, None, [], {}, {"weights": None}, {"weights": []}])
def test_a_group_that_is_none_is_refused(group):
    document = compressed()
    document["config_groups"]["group_0"] = group
    assert problems_of(document)


def test_every_problem_is_told_at_once():
    document = compressed({"weights": CT | {"num_bits": 8, "type": "int"}}, kv_cache_scheme={"a": 1}, ignore=["re:("])
    assert len(problems_of(document)) == 4


# --- whole checkpoints ---


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
