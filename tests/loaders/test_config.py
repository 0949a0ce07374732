"""config.json: strict, complete in its complaints, equal in both spellings, and of one mind with transformers."""

from __future__ import annotations

import ast
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from handmade import CONFIG, MOE_CONFIG
from transformers import Qwen3Config as TheirDense
from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM
from transformers import Qwen3MoeConfig as TheirMoe

from loaders import open_checkpoint
from loaders.config import RopeParameters, config_from_json
from loaders.expand import expand
from loaders.families import family_module
from loaders.qwen3 import Qwen3Config, Qwen3MoeConfig

FULL, SLIDING = "full_attention", "sliding_attention"
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GONE = object()


def changed(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """``base`` with keys replaced, or removed by ``GONE``."""
    return {key: value for key, value in (base | changes).items() if value is not GONE}


def read(document: dict[str, Any]) -> Any:
    config, problems = config_from_json(document)
    assert problems == []
    return config


def problems_of(document: dict[str, Any]) -> list[str]:
    config, problems = config_from_json(document)
    assert config is None
    return problems


def test_a_dense_config_is_read_whole() -> None:
    assert read(CONFIG) == Qwen3Config(
        architecture="Qwen3ForCausalLM",
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        hidden_act="silu",
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_parameters=RopeParameters(rope_type="default", rope_theta=10000.0),
        layer_types=(FULL, FULL),
    )


def test_a_sparse_config_is_read_whole() -> None:
    config = read(MOE_CONFIG | {"mlp_only_layers": [1]})
    assert type(config) is Qwen3MoeConfig
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (3, 2, 6)
    assert (config.norm_topk_prob, config.decoder_sparse_step, config.mlp_only_layers) == (True, 1, (1,))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
REQUIRED = sorted(set(CONFIG) - {"architectures", "model_type", "num_key_value_heads", "head_dim", "rope_parameters"})
REQUIRED_MOE = ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step"]


def test_all_missing_keys_are_reported_together() -> None:
    expected = [f"config.json: {name} is missing. Is the file complete?" for name in [*REQUIRED, "rope_theta"]]
    assert sorted(problems_of({"architectures": ["Qwen3ForCausalLM"]})) == sorted(expected)
    expected += [f"config.json: {name} is missing. Is the file complete?" for name in REQUIRED_MOE]
    assert sorted(problems_of({"architectures": ["Qwen3MoeForCausalLM"]})) == sorted(expected)


@pytest.mark.parametrize("key", REQUIRED + REQUIRED_MOE)
def test_one_missing_key_is_one_problem(key: str) -> None:
    assert problems_of(changed(MOE_CONFIG, **{key: GONE})) == [f"config.json: {key} is missing. Is the file complete?"]


def test_unknown_keys_are_all_named() -> None:
    assert problems_of(CONFIG | {"attn_logit_softcap": 50.0, "mystery": [1, {"deep": [[[[]]]]}]}) == [
        "config.json: option 'attn_logit_softcap' = 50.0 is not implemented. Remove it if no result depends on it.",
        "config.json: option 'mystery' = [1, {'deep': [[[[]]]]}] is not implemented."
        " Remove it if no result depends on it.",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"architectures": GONE},
            "architectures is None, expected a list of one of: Gemma3ForCausalLM, Qwen3ForCausalLM,",
        ),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures is 'Qwen3ForCausalLM', expected a list"),
        ({"architectures": []}, "architectures is [], expected a list"),
        ({"architectures": ["A", "B"]}, "architectures is ['A', 'B'], expected a list"),
        ({"architectures": ["LlamaForCausalLM"]}, "architecture 'LlamaForCausalLM' is unknown. Known: Gemma3"),
        ({"architectures": [["Qwen3ForCausalLM"]]}, "architecture ['Qwen3ForCausalLM'] is unknown"),
        ({"architectures": [{}]}, "architecture {} is unknown"),
        ({"vocab_size": "11"}, "vocab_size is '11', expected an integer"),
        ({"vocab_size": 11.0}, "vocab_size is 11.0, expected an integer"),
        ({"vocab_size": True}, "vocab_size is True, expected an integer"),
        ({"vocab_size": None}, "vocab_size is None, expected an integer"),
        ({"vocab_size": 0}, "vocab_size is 0, expected at least 1"),
        ({"hidden_size": -8}, "hidden_size is -8, expected at least 1"),
        ({"head_dim": 0}, "head_dim is 0, expected at least 1"),
        ({"head_dim": 5}, "head_dim=5 is odd; rotary embedding needs pairs"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_attention_heads=3 is not a multiple of num_key_"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', expected a number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0, expected more than 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', expected a list, each an integer"),
        ({"eos_token_id": [2, None]}, "eos_token_id is [2, None], expected a list, each an integer"),
        ({"pad_token_id": "0"}, "pad_token_id is '0', expected an integer or null"),
        ({"eos_token_id": 2**63}, "eos_token_id is 9223372036854775808, expected an integer of 32 bits"),
        ({"eos_token_id": [2, 2**31]}, "eos_token_id is 2147483648, expected an integer of 32 bits"),
        ({"pad_token_id": 2**31}, "pad_token_id is 2147483648, expected an integer of 32 bits"),
        ({"rope_parameters": YARN | {"rope_theta": 1e4, "beta_fast": -1}}, "rope option beta_fast is -1.0, expected 0"),
        ({"rope_parameters": YARN | {"rope_theta": 1e4, "beta_slow": -2}}, "rope option beta_slow is -2.0, expected 0"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, expected at most 10000"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648, expected at most 2147483647"),
        ({"layer_types": [FULL]}, "layer_types has 1 entries, expected num_hidden_layers=2"),
        ({"layer_types": [FULL, "linear_attention"]}, "layer_types ['linear_attention'] are not implemented"),
        ({"layer_types": [FULL, SLIDING]}, "layer_types asks for sliding_attention, but no sliding_window is in force"),
        ({"layer_types": [FULL, 2]}, "layer_types is ['full_attention', 2], expected a list, each a string"),
        ({"use_sliding_window": "false"}, "use_sliding_window is 'false', expected true or false"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0, expected at least 1"),
        ({"max_window_layers": "28"}, "max_window_layers is '28', expected an integer"),
        # options that exist and are not implemented
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented, expected 'silu'"),
        ({"partial_rotary_factor": 0.5}, "option 'partial_rotary_factor' = 0.5 is not implemented"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8' is not implemented"),
        ({"auto_map": {"AutoModel": "evil.py"}}, "option 'auto_map' = {'AutoModel': 'evil.py'} is not implemented"),
        ({"is_encoder_decoder": True}, "option 'is_encoder_decoder' = True is not implemented, expected False"),
        ({"num_experts": 3}, "option 'num_experts' = 3 is not implemented"),
        # rotary embedding
        (
            {"rope_parameters": ROPE | {"rope_type": "longrope"}},
            "rope_type 'longrope' is not implemented. Known: default",
        ),
        ({"rope_parameters": ROPE | {"rope_type": "llama3"}}, "rope_type 'llama3' is not implemented"),
        ({"rope_parameters": ROPE | {"rope_type": ["yarn"]}}, "rope_type ['yarn'] is not implemented"),
        (
            {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
            "rope option 'partial_rotary_factor' = 0.5 is not",
        ),
        (
            {"rope_parameters": ROPE | {"factor": 2.0}},
            "rope option 'factor' = 2.0 is not implemented for rope_type 'def",
        ),
        ({"rope_parameters": [ROPE]}, "rope_parameters is [{'rope_theta': 10000.0, 'rope_type': 'default'}], expected"),
        ({"rope_parameters": ROPE | {"rope_theta": "1e4"}}, "rope_theta is '1e4', expected a number"),
        ({"rope_parameters": ROPE | {"rope_theta": 1}}, "rope option rope_theta is 1.0, expected more than 1"),
        ({"rope_parameters": ROPE | {"rope_theta": -5}}, "rope option rope_theta is -5.0, expected more than 1"),
        ({"rope_parameters": ROPE | {"rope_type": "linear"}}, "rope_type 'linear' needs a factor"),
        ({"rope_parameters": ROPE | {"rope_type": "dynamic"}}, "rope_type 'dynamic' needs a factor"),
        ({"rope_parameters": ROPE | {"rope_type": "linear", "factor": 0}}, "rope option factor is 0.0, expected more"),
        (
            {"rope_parameters": ROPE | {"rope_type": "linear", "factor": "2"}},
            "factor is '2', expected a number or null",
        ),
        (
            {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 0}},
            "rope option original_max_position_embeddings is 0, expected more than 0",
        ),
        ({"head_dim": 2, "rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2}}, "head_dim=2 is too small"),
        ({"rope_theta": 5000.0}, "rope_theta is 5000.0 beside 10000.0 in rope_parameters. Remove one."),
        ({"rope_scaling": {"rope_type": "linear"}}, "and rope_scaling {'rope_type': 'linear'} disagree. Remove one."),
        ({"rope_parameters": ROPE | {"type": "yarn"}}, "rope type 'yarn' and rope_type 'default' disagree"),
    ],
)
def test_a_value_that_cannot_be_had_is_one_problem(changes: dict[str, Any], expected: str) -> None:
    (problem,) = problems_of(changed(CONFIG, **changes))
    assert problem.startswith("config.json: ")
    assert expected in problem


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_experts_per_tok": 4}, "num_experts_per_tok=4 of num_experts=3 cannot be chosen"),
        ({"num_experts": 10**12}, "num_experts is 1000000000000, expected at most 1000000 in all layers together"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0, expected at least 1"),
        ({"num_local_experts": 4}, "num_experts=3 and num_local_experts=4 disagree"),
        ({"mlp_only_layers": 1}, "mlp_only_layers is 1, expected a list, each an integer"),
        ({"norm_topk_prob": None}, "norm_topk_prob is None, expected true or false"),
        # the sparse model of transformers never reads the key: what it asks for would be ignored
        (
            {"layer_types": [FULL, SLIDING], "use_sliding_window": True, "sliding_window": 4},
            "layer_types ['full_attention', 'sliding_attention'] is not implemented for Qwen3MoeForCausalLM, expected"
            " ['sliding_attention', 'sliding_attention']",
        ),
    ],
)
def test_a_value_that_a_sparse_model_cannot_have_is_one_problem(changes: dict[str, Any], expected: str) -> None:
    (problem,) = problems_of(changed(MOE_CONFIG, **changes))
    assert expected in problem


def test_problems_of_every_kind_are_reported_together() -> None:
    document = changed(CONFIG, vocab_size=GONE, mystery=1, rope_parameters={"rope_type": "su"}, head_dim=3)
    assert problems_of(document) == [
        "config.json: rope_type 'su' is not implemented. Known: default, linear, dynamic, yarn",
        "config.json: vocab_size is missing. Is the file complete?",
        "config.json: option 'mystery' = 1 is not implemented. Remove it if no result depends on it.",
        "config.json: head_dim=3 is odd; rotary embedding needs pairs",
    ]
    assert problems_of(CONFIG | {"mystery": 1, "head_dim": 3, "hidden_act": "relu"}) == [
        "config.json: option 'mystery' = 1 is not implemented. Remove it if no result depends on it.",
        "config.json: head_dim=3 is odd; rotary embedding needs pairs",
        "config.json: hidden_act 'relu' is not implemented, expected 'silu'",
    ]


def test_rotary_parameters_of_their_own_for_each_layer_type_are_refused_by_name() -> None:
    assert problems_of(CONFIG | {"rope_parameters": {FULL: {"rope_theta": 2}, SLIDING: {"rope_theta": 3}}}) == [
        "config.json: rope option 'full_attention' = {'rope_theta': 2} is not implemented for rope_type 'default'",
        "config.json: rope option 'sliding_attention' = {'rope_theta': 3} is not implemented for rope_type 'default'",
        "config.json: rope_theta is missing. Is the file complete?",
    ]


def test_a_giant_value_does_not_flood_its_error() -> None:
    for key in ("hidden_act", "vocab_size", "rope_parameters", "layer_types", "architectures", "mystery"):
        for giant in ("x" * 10**6, [10**6] * 10**6, {str(number): 1 for number in range(10_000)}):
            problems = problems_of(CONFIG | {key: giant})
            assert all(len(problem) < 400 for problem in problems)


# Both spellings


@pytest.mark.parametrize(
    ("new", "old"),
    [
        pytest.param(
            {"rope_parameters": ROPE, "dtype": "bfloat16"},
            {"rope_parameters": GONE, "rope_theta": 10000, "rope_scaling": None, "torch_dtype": "bfloat16"},
            id="default",
        ),
        pytest.param(
            {"rope_parameters": YARN | {"rope_theta": 1e6}},
            {"rope_parameters": GONE, "rope_theta": 1000000, "rope_scaling": YARN},
            id="yarn",
        ),
        pytest.param(
            {"rope_parameters": YARN | {"rope_theta": 1e6}},
            {
                "rope_parameters": GONE,
                "rope_theta": 1000000,
                "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16},
            },
            id="yarn, oldest",
        ),
        pytest.param(
            {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}},
            {"rope_parameters": GONE, "rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2}},
            id="linear",
        ),
        pytest.param(
            {"rope_parameters": ROPE},
            {"rope_parameters": ROPE | {"type": "default", "partial_rotary_factor": 1.0}, "rope_theta": 10000.0},
            id="both, agreeing",
        ),
        pytest.param({"eos_token_id": 7}, {"eos_token_id": [7]}, id="one stop token"),
        pytest.param({}, {"sliding_window": 4096, "use_sliding_window": False}, id="window switched off"),
        pytest.param({}, {"quantization_config": None, "is_encoder_decoder": False, "pad_token_id": None}, id="off"),
        pytest.param({}, {"layer_types": None, "attention_dropout": 0.5, "model_type": "x"}, id="inert"),
    ],
)
def test_two_spellings_of_one_config_are_equal(new: dict[str, Any], old: dict[str, Any]) -> None:
    ours, theirs = read(changed(CONFIG, **new)), read(changed(CONFIG, **old))
    assert ours == theirs
    assert ours.eos_token_id == theirs.eos_token_id


def test_experts_are_counted_under_either_name() -> None:
    renamed = changed(MOE_CONFIG, num_experts=GONE, num_local_experts=3)
    assert read(renamed) == read(MOE_CONFIG) == read(MOE_CONFIG | {"num_local_experts": 3})


def test_how_generation_ends_does_not_make_two_models_differ() -> None:
    assert read(CONFIG | {"eos_token_id": 7, "pad_token_id": 0}) == read(CONFIG)


def test_yarn_without_a_factor_takes_the_ratio_of_the_lengths() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    assert read(CONFIG | {"rope_parameters": rope}).rope_parameters.factor == 4.0
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    assert read(CONFIG | {"rope_parameters": rope}).rope_parameters.original_max_position_embeddings == 64


def test_an_absent_head_dim_means_what_each_architecture_means_by_it() -> None:
    assert read(changed(CONFIG, head_dim=GONE)).head_dim == 128
    assert read(changed(MOE_CONFIG, head_dim=GONE)).head_dim == 4
    assert read(changed(CONFIG, num_key_value_heads=None)).num_key_value_heads == 2


@pytest.mark.parametrize(("ours", "theirs"), [(CONFIG, TheirDense), (MOE_CONFIG, TheirMoe)], ids=["dense", "sparse"])
def test_what_a_file_leaves_out_is_what_transformers_takes_it_for(ours: dict[str, Any], theirs: type) -> None:
    heads = {"num_attention_heads": 64, "num_key_value_heads": GONE}
    document = changed(ours, **heads, use_sliding_window=True, max_window_layers=1, sliding_window=GONE)
    given = {key: value for key, value in document.items() if key not in ("architectures", "model_type")}
    config, expected = read(document), theirs(**given)
    assert config.num_key_value_heads == expected.num_key_value_heads
    assert config.sliding_window == expected.sliding_window == 4096
    assert read(changed(document, sliding_window=None)).sliding_window is None
    named = changed(document, layer_types=[FULL, SLIDING] if theirs is TheirDense else [SLIDING, SLIDING])
    assert read(named).window(1) == 4096


@pytest.mark.parametrize(
    ("base", "changes", "windows"),
    [
        (CONFIG, {}, [None] * 4),
        (CONFIG, {"use_sliding_window": True}, [None] * 4),  # max_window_layers is 28 where it is absent
        (CONFIG, {"use_sliding_window": True, "max_window_layers": 0}, [7] * 4),
        (CONFIG, {"use_sliding_window": True, "max_window_layers": 3}, [None, None, None, 7]),
        (CONFIG, {"use_sliding_window": True, "layer_types": [SLIDING, FULL, FULL, SLIDING]}, [7, None, None, 7]),
        (CONFIG, {"use_sliding_window": False, "max_window_layers": 0}, [None] * 4),
        (MOE_CONFIG, {}, [None] * 4),
        (MOE_CONFIG, {"use_sliding_window": True, "max_window_layers": 3}, [7] * 4),
    ],
)
def test_every_layer_slides_exactly_where_transformers_slides(
    base: dict[str, Any], changes: dict[str, Any], windows: list[int | None]
) -> None:
    config = read(base | {"num_hidden_layers": 4, "sliding_window": 7} | changes)
    assert [config.window(layer) for layer in range(4)] == windows
    given = {key: value for key, value in (base | changes).items() if key not in ("architectures", "model_type")}
    options = given | {"num_hidden_layers": 4, "sliding_window": 7}
    if "num_experts" in base:
        theirs = [layer.self_attn.sliding_window for layer in Qwen3MoeForCausalLM(TheirMoe(**options)).model.layers]
    else:
        theirs = [layer.self_attn.sliding_window for layer in Qwen3ForCausalLM(TheirDense(**options)).model.layers]
    assert windows == theirs


@pytest.mark.parametrize(
    ("step", "dense", "expected"),
    [
        (1, [], [True, True, True, True]),
        (2, [], [False, True, False, True]),
        (1, [1, 3], [True, False, True, False]),
        (2, [1], [False, False, False, True]),
        (3, [], [False, False, True, False]),
    ],
)
def test_a_layer_is_sparse_exactly_where_transformers_makes_it_so(
    step: int, dense: list[int], expected: list[bool]
) -> None:
    options = changed(MOE_CONFIG, num_hidden_layers=4, decoder_sparse_step=step, mlp_only_layers=dense)
    config = read(options)
    assert [config.is_sparse(layer) for layer in range(4)] == expected
    options = {key: value for key, value in options.items() if key not in ("architectures", "model_type")}
    model = Qwen3MoeForCausalLM(TheirMoe(**options))
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == expected


# What transformers writes

SMALL = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SPARSE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
YARN_WHOLE = YARN | {
    "rope_theta": 1e4,
    "attention_factor": 1.1,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "truncate": False,
}
WRITTEN: dict[str, tuple[type, dict[str, Any]]] = {
    "dense": (Qwen3ForCausalLM, {"head_dim": 16}),
    "dense tied": (Qwen3ForCausalLM, {"head_dim": 16, "tie_word_embeddings": True}),
    "dense biased": (Qwen3ForCausalLM, {"head_dim": 16, "attention_bias": True}),
    "dense, upper layers slide": (
        Qwen3ForCausalLM,
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "dense, mixed layers": (
        Qwen3ForCausalLM,
        {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "layer_types": [SLIDING, FULL, SLIDING]},
    ),
    "dense, window off": (Qwen3ForCausalLM, {"head_dim": 8, "use_sliding_window": False, "sliding_window": 5}),
    "dense linear": (Qwen3ForCausalLM, {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}}),
    "dense dynamic": (Qwen3ForCausalLM, {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}),
    "dense yarn": (Qwen3ForCausalLM, {"rope_parameters": YARN | {"rope_theta": 1e4}}),
    "dense yarn, every option": (Qwen3ForCausalLM, {"rope_parameters": YARN_WHOLE}),
    "dense, one kv head": (Qwen3ForCausalLM, {"num_key_value_heads": 1}),
    "sparse without head_dim": (Qwen3MoeForCausalLM, SPARSE),
    "sparse with head_dim": (Qwen3MoeForCausalLM, SPARSE | {"head_dim": 10}),
    "sparse tied": (Qwen3MoeForCausalLM, SPARSE | {"tie_word_embeddings": True}),
    "sparse and dense layers": (Qwen3MoeForCausalLM, SPARSE | {"mlp_only_layers": [0], "decoder_sparse_step": 2}),
    "sparse sliding": (Qwen3MoeForCausalLM, SPARSE | {"use_sliding_window": True, "sliding_window": 5}),
}


@pytest.mark.parametrize("max_shard_size", ["1GB", "10KB"])
@pytest.mark.parametrize("case", WRITTEN)
def test_what_transformers_writes_opens_and_every_tensor_is_consumed_exactly_once(
    tmp_path: Path, case: str, max_shard_size: str
) -> None:
    model_class, options = WRITTEN[case]
    config_class = TheirDense if model_class is Qwen3ForCausalLM else TheirMoe
    model = model_class(config_class(**(SMALL | options)))
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    checkpoint = open_checkpoint(tmp_path)
    ours, theirs = checkpoint.config, model.config
    for name in ("vocab_size", "hidden_size", "num_key_value_heads", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(ours, name) == getattr(theirs, name)
    rope = theirs.rope_parameters
    assert isinstance(ours, Qwen3Config)
    assert {key: getattr(ours.rope_parameters, key) for key in rope} == rope
    assert ours.head_dim == model.model.layers[0].self_attn.head_dim
    assert [ours.window(i) for i in range(3)] == [layer.self_attn.sliding_window for layer in model.model.layers]
    specs = expand(family_module(ours.architecture).RULES, ours)
    shapes = [(placement.tensor, spec.tensor_shape) for spec in specs for placement in spec.placements]
    assert len(shapes) == len({name for name, _ in shapes})
    assert dict(shapes) == {name: info.shape for name, info in checkpoint.tensors.items()}


# Every field is read

SOURCE = Path(__file__).parents[2]
PACKAGES = ("loaders", "jax_models", "torch_models", "parity")


def names_read() -> set[str]:
    """Attributes that some module loads, and keys that some module gets from the document."""
    found: set[str] = set()
    for path in itertools.chain.from_iterable((SOURCE / package).rglob("*.py") for package in PACKAGES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            is_get = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get"
            if is_get and node.args and isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
    return found


@pytest.mark.parametrize("config_class", [Qwen3Config, Qwen3MoeConfig, RopeParameters])
def test_every_config_field_is_read_somewhere(config_class: type) -> None:
    fields = {field.name for field in dataclasses.fields(config_class)}
    assert fields - names_read() <= {"pad_token_id"}  # waits for generate()
