"""config.json of Gemma 3: strict, equal in both spellings, and of one mind with transformers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from test_config import GONE, changed, names_read, problems_of, read
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from loaders import open_checkpoint
from loaders.config import RopeParameters, config_from_json
from loaders.expand import expand
from loaders.gemma3 import RULES, Gemma3Config

FULL, SLIDING = "full_attention", "sliding_attention"
LOCAL, GLOBAL = {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "default", "rope_theta": 1e6}
LINEAR = {"rope_type": "linear", "factor": 8.0}

# the smallest config.json that is complete
CONFIG: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "sliding_window": 5,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
}
# google/gemma-3-1b-it, as published
PUBLISHED: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}


def test_a_published_config_is_read_whole() -> None:
    config = read(PUBLISHED)
    assert config == Gemma3Config(
        architecture="Gemma3ForCausalLM",
        vocab_size=262144,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32768,
        full_attention_rope=RopeParameters(**GLOBAL),
        sliding_attention_rope=RopeParameters(**LOCAL),
        layer_types=(*([SLIDING] * 5 + [FULL]) * 4, SLIDING, SLIDING),
        sliding_window=512,
    )
    assert config.eos_token_id == (1, 106)
    assert config.tie_word_embeddings
    assert [config.window(layer) for layer in (4, 5, 6)] == [512, None, 512]
    assert [config.rope(layer).rope_theta for layer in (4, 5, 6)] == [1e4, 1e6, 1e4]


REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers")


@pytest.mark.parametrize("key", REQUIRED)
def test_one_missing_key_is_one_problem(key: str) -> None:
    for base in (CONFIG, changed(CONFIG, layer_types=GONE)):
        assert problems_of(changed(base, **{key: GONE})) == [f"config.json: {key} is missing. Is the file complete?"]


def test_an_absent_key_means_what_transformers_means_by_it() -> None:
    least = {key: CONFIG[key] for key in ("architectures", *REQUIRED)}
    ours, theirs = read(least), Gemma3TextConfig(**{key: CONFIG[key] for key in REQUIRED})
    for name in {field.name for field in dataclasses.fields(Gemma3Config)} & set(vars(theirs)):
        expected = getattr(theirs, name)
        found = getattr(ours, name)
        assert found == (tuple(expected) if isinstance(expected, list) else expected) or found == (expected,), name
    assert [vars_of(rope) for rope in (ours.full_attention_rope, ours.sliding_attention_rope)] == [
        theirs.rope_parameters[kind] for kind in (FULL, SLIDING)
    ]


def vars_of(rope: RopeParameters) -> dict[str, Any]:
    """What is not as it is by default, in the spelling of config.json."""
    absent = RopeParameters(rope_type="", rope_theta=0)
    found = {field.name: getattr(rope, field.name) for field in dataclasses.fields(rope)}
    return {name: value for name, value in found.items() if value != getattr(absent, name)}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # sizes
        *(
            ({name: 0}, f"{name} is 0, expected at least 1")
            for name in ("vocab_size", *REQUIRED, "num_attention_heads", "num_key_value_heads", "head_dim")
            if name != "num_hidden_layers"
        ),
        ({"num_hidden_layers": 0, "layer_types": None}, "num_hidden_layers is 0, expected at least 1"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1, expected at least 1"),
        ({"sliding_window": 0}, "sliding_window is 0, expected at least 1"),
        ({"num_hidden_layers": 10_001, "layer_types": None}, "num_hidden_layers is 10001, expected at most 10000"),
        ({"num_hidden_layers": 10**12, "layer_types": None}, "is 1000000000000, expected at most 10000"),
        ({"num_key_value_heads": 3}, "num_attention_heads=2 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7 is odd; rotary embedding needs pairs"),
        ({"hidden_size": "8"}, "hidden_size is '8', expected an integer"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        # formulas
        ({"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not implemented, expected 'gelu_pytorch_tanh'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0, expected more than 0"),
        ({"query_pre_attn_scalar": -4}, "query_pre_attn_scalar is -4.0, expected more than 0"),
        ({"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0.0, expected more than 0"),
        ({"final_logit_softcapping": -30.0}, "final_logit_softcapping is -30.0, expected more than 0"),
        ({"final_logit_softcapping": "30"}, "final_logit_softcapping is '30', expected a number or null"),
        (
            {"use_bidirectional_attention": True},
            "option 'use_bidirectional_attention' = True is not implemented, expected False",
        ),
        ({"cache_implementation": "quantized"}, "cache_implementation 'quantized' is not known, expected 'hybrid'"),
        ({"mystery": 1}, "option 'mystery' = 1 is not implemented"),
        ({"quantization_config": {"bits": 4}}, "quant_method None is not implemented"),
        ({"eos_token_id": "1"}, "eos_token_id is '1', expected a list, each an integer"),
        # layers
        ({"layer_types": [FULL]}, "layer_types has 1 entries, expected num_hidden_layers=4"),
        (
            {"layer_types": [FULL] * 3 + ["chunked"]},
            "layer_types ['chunked'] are not implemented. Known: full_",
        ),
        ({"layer_types": FULL}, "layer_types is 'full_attention', expected a list, each a string"),
        ({"sliding_window": None}, "layer_types asks for sliding_attention, but sliding_window is null"),
        ({"sliding_window_pattern": 0, "layer_types": None}, "sliding_window_pattern is 0, expected an integer of at"),
        ({"sliding_window_pattern": "6"}, "sliding_window_pattern is '6', expected an integer of at least 1"),
        ({"_sliding_window_pattern": True}, "sliding_window_pattern is True, expected an integer of at least 1"),
        # rotary embedding
        (
            {"rope_parameters": GLOBAL},
            "{'rope_theta': 1000000.0, 'rope_type': 'default'}, expected an object of full",
        ),
        ({"rope_parameters": [GLOBAL]}, "[{'rope_theta': 1000000.0, 'rope_type': 'default'}], expected an object of"),
        ({"rope_parameters": {FULL: [1]}}, "rope_parameters['full_attention'] is [1], expected an object"),
        ({"rope_parameters": {SLIDING: "x"}}, "rope_parameters['sliding_attention'] is 'x', expected an object"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected an object"),
        ({"rope_scaling": [8.0]}, "rope_scaling is [8.0], expected an object"),
        (
            {"rope_parameters": {FULL: GLOBAL}, "rope_scaling": {"rope_type": "linear"}},
            "rope_scaling and rope_parameters['full_attention'] disagree about 'rope_type'",
        ),
        (
            {"rope_parameters": {FULL: GLOBAL}, "rope_theta": 1e5},
            "two bases for full_attention: 100000.0 and 1000000.0",
        ),
        (
            {"rope_parameters": {SLIDING: LOCAL}, "rope_local_base_freq": 1e5},
            "two bases for sliding_attention: 100000.0 and 10000.0",
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic' is not implemented for Gemma 3",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' needs a factor (full_attention)"),
        (
            {"rope_parameters": {SLIDING: {"rope_type": "su"}}},
            "rope_type 'su' is not implemented. Known: default, linear, dynamic, yarn (sliding_attention)",
        ),
        (
            {"rope_parameters": {SLIDING: LOCAL | {"partial_rotary_factor": 0.5}}},
            "rope option 'partial_rotary_factor' = 0.5 is not implemented for rope_type 'default' (sliding_attention)",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
            "rope option truncate is false for full_attention, which transformers does not read",
        ),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6', expected a number (full_attention)"),
        ({"rope_local_base_freq": 1}, "rope option rope_theta is 1.0, expected more than 1 (sliding_attention)"),
        ({"rope_scaling": LINEAR | {"type": "yarn"}}, "rope type 'yarn' and rope_type 'linear' disagree"),
    ],
)
def test_a_value_that_cannot_be_had_is_one_problem(changes: dict[str, Any], expected: str) -> None:
    (problem,) = problems_of(changed(CONFIG, **changes))
    assert problem.startswith("config.json: ")
    assert expected in problem
    assert len(problem) < 400


def test_problems_of_every_kind_are_reported_together() -> None:
    document = changed(CONFIG, hidden_size=GONE, mystery=1, rope_scaling=3, sliding_window_pattern=0)
    assert problems_of(document) == [
        "config.json: rope_scaling is 3, expected an object",
        "config.json: sliding_window_pattern is 0, expected an integer of at least 1",
        "config.json: hidden_size is missing. Is the file complete?",
        "config.json: option 'mystery' = 1 is not implemented. Remove it if no result depends on it.",
    ]


@pytest.mark.parametrize("giant", ["x" * 10**6, [10**6] * 10**5, {str(number): 1 for number in range(10_000)}])
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling", "rope_theta", "layer_types", "hidden_activation"])
def test_a_giant_value_does_not_flood_its_error(key: str, giant: Any) -> None:
    _, problems = config_from_json(CONFIG | {key: giant})
    assert all(len(problem) < 500 for problem in problems)


@pytest.mark.parametrize(
    ("new", "old"),
    [
        pytest.param(
            {"rope_parameters": {FULL: GLOBAL, SLIDING: LOCAL}},
            {"rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None},
            id="default",
        ),
        pytest.param({"rope_parameters": {FULL: GLOBAL, SLIDING: LOCAL}}, {}, id="absent"),
        pytest.param({"rope_parameters": {FULL: GLOBAL, SLIDING: LOCAL}}, {"rope_parameters": {FULL: None}}, id="null"),
        pytest.param(
            {"rope_parameters": {FULL: LINEAR | {"rope_theta": 1e6}, SLIDING: LOCAL}},
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": LINEAR},
            id="linear",
        ),
        pytest.param(
            {"rope_parameters": {FULL: LINEAR | {"rope_theta": 1e6}, SLIDING: LOCAL}},
            {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 8}},
            id="linear, oldest",
        ),
        pytest.param(
            {"rope_parameters": {SLIDING: {"rope_theta": 5e3}}}, {"rope_local_base_freq": 5000}, id="local base alone"
        ),
        pytest.param({"rope_parameters": {FULL: GLOBAL, SLIDING: LOCAL}, "rope_theta": 1e6}, {}, id="both, agreeing"),
        pytest.param({}, {"layer_types": None, "sliding_window_pattern": 3}, id="pattern"),
        pytest.param({}, {"sliding_window_pattern": 2, "_sliding_window_pattern": 6}, id="layer_types decide"),
        pytest.param({"eos_token_id": [7]}, {"eos_token_id": 7}, id="one stop token"),
        pytest.param({}, {"use_bidirectional_attention": False, "cache_implementation": "hybrid"}, id="off"),
        pytest.param({}, {"attention_dropout": 0.5, "torch_dtype": "bfloat16", "use_cache": False}, id="inert"),
    ],
)
def test_two_spellings_of_one_config_are_equal(new: dict[str, Any], old: dict[str, Any]) -> None:
    ours, theirs = read(changed(CONFIG, **new)), read(changed(CONFIG, **old))
    assert ours == theirs
    assert ours.eos_token_id == theirs.eos_token_id


def test_the_window_of_a_model_that_never_slides_may_be_null() -> None:
    assert read(CONFIG | {"sliding_window": None, "layer_types": [FULL] * 4}).window(0) is None


def test_a_private_pattern_that_transformers_does_not_read_is_refused_where_it_would_matter() -> None:
    without = {"layer_types": None, "sliding_window_pattern": None}
    (problem,) = problems_of(CONFIG | without | {"_sliding_window_pattern": 2})
    assert "_sliding_window_pattern is 2 without layer_types: transformers reads 6 then. Give layer_types" in problem
    assert read(CONFIG | without | {"_sliding_window_pattern": 6}).layer_types == (SLIDING,) * 4


def test_how_generation_ends() -> None:
    assert read(CONFIG).eos_token_id == (1,)
    assert read(CONFIG | {"eos_token_id": None}).eos_token_id == ()
    assert read(CONFIG | {"eos_token_id": 7, "pad_token_id": 3}) == read(CONFIG)


def test_yarn_without_any_length_takes_the_default_one() -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0}
    config = read(changed(CONFIG, rope_scaling=yarn, max_position_embeddings=GONE))
    assert config.full_attention_rope.original_max_position_embeddings == 131_072


@pytest.mark.parametrize("pattern", [1, 2, 3, 6])
def test_every_layer_slides_exactly_where_transformers_slides(pattern: int) -> None:
    options = changed(CONFIG, num_hidden_layers=7, layer_types=GONE, sliding_window_pattern=pattern)
    config = read(options)
    given = {key: value for key, value in options.items() if key not in ("architectures", "model_type")}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**given))
    assert [config.window(layer) for layer in range(7)] == [
        layer.self_attn.sliding_window for layer in model.model.layers
    ]


WRITTEN: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied biased": {"tie_word_embeddings": False, "attention_bias": True},
    "linear": {"rope_parameters": {FULL: LINEAR | {"rope_theta": 1e6}, SLIDING: LOCAL}},
    "capped": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 9},
    "pattern": {"layer_types": None, "sliding_window_pattern": 2},
}


@pytest.mark.parametrize("case", WRITTEN)
def test_what_transformers_writes_opens_and_every_tensor_is_consumed_exactly_once(tmp_path: Path, case: str) -> None:
    given = {key: value for key, value in CONFIG.items() if key not in ("architectures", "model_type")}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**given | {"pad_token_id": None} | WRITTEN[case]))
    model.save_pretrained(tmp_path)
    checkpoint, theirs = open_checkpoint(tmp_path), model.config
    ours = checkpoint.config
    assert isinstance(ours, Gemma3Config)
    written = json.loads((tmp_path / "config.json").read_text())
    for name in ("vocab_size", "head_dim", "query_pre_attn_scalar", "sliding_window", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name) == written[name]
    assert (ours.attn_logit_softcapping, ours.final_logit_softcapping) == (
        theirs.attn_logit_softcapping,
        theirs.final_logit_softcapping,
    )
    assert list(ours.layer_types) == theirs.layer_types
    assert [vars_of(ours.full_attention_rope), vars_of(ours.sliding_attention_rope)] == [
        theirs.rope_parameters[kind] for kind in (FULL, SLIDING)
    ]
    specs = expand(RULES, ours)
    shapes = [(placement.tensor, spec.tensor_shape) for spec in specs for placement in spec.placements]
    assert len(shapes) == len({name for name, _ in shapes})
    assert dict(shapes) == {name: info.shape for name, info in checkpoint.tensors.items()}


def test_exactly_the_norms_are_zero_centred() -> None:
    assert {rule.tensor for rule in RULES if rule.zero_centred} == {
        rule.tensor for rule in RULES if "norm" in rule.tensor
    }


def test_every_config_field_is_read_somewhere() -> None:
    fields = {field.name for field in dataclasses.fields(Gemma3Config)}
    assert fields <= names_read()
