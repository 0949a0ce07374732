"""config.json of Qwen3.5: strict, equal in every spelling, and of one mind with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_config import GONE, changed, names_read, problems_of, read
from transformers import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig, Qwen3_5TextConfig

from loaders import open_checkpoint
from loaders.config import RopeParameters, config_from_json
from loaders.expand import expand
from loaders.qwen3_5 import RULES, Qwen3_5Config, Qwen3_5MoeConfig
from loaders.stage import Stage
from loaders.vision import VisionConfig
from loaders.writing.writer import TensorType

FULL, LINEAR = "full_attention", "linear_attention"
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
# the smallest config.json that is complete
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": ROPE,
}
MOE: dict[str, Any] = {
    **{key: value for key, value in CONFIG.items() if key != "intermediate_size"},
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "shared_expert_intermediate_size": 7,
}
# the text part as published (27B, 35B-A3B); the newer of them say output_gate_type and language_model_only too
PUBLISHED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "bos_token_id": 248044,
    "dtype": "bfloat16",
    "eos_token_id": 248044,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 17408,
    "layer_types": [FULL if (layer + 1) % 4 == 0 else LINEAR for layer in range(64)],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 48,
    "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_5_text",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_attention_heads": 24,
    "num_hidden_layers": 64,
    "num_key_value_heads": 4,
    "output_gate_type": "swish",
    "pad_token_id": None,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 248320,
}
EXPERTS = {
    "model_type": "qwen3_5_moe_text",
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
}


def wrapped(
    text: dict[str, Any], architecture: str = "Qwen3_5ForConditionalGeneration", **outer: Any
) -> dict[str, Any]:
    return changed(
        {
            "architectures": [architecture],
            "image_token_id": 248056,
            "language_model_only": False,
            "model_type": "qwen3_5",
            "text_config": text,
            "tie_word_embeddings": False,
            "transformers_version": "4.57.0.dev0",
            "video_token_id": 248057,
            "vision_config": {
                "depth": 27,
                "model_type": "qwen3_5",
                "deepstack_visual_indexes": [],
                "out_hidden_size": text["hidden_size"],
            },
            "vision_end_token_id": 248054,
            "vision_start_token_id": 248053,
        },
        **outer,
    )


def tower(text: dict[str, Any]) -> VisionConfig:
    return VisionConfig(image_token_id=248056, video_token_id=248057, out_hidden_size=text["hidden_size"])


def test_a_published_config_is_read_whole() -> None:
    config = read(wrapped(PUBLISHED))
    assert config == Qwen3_5Config(
        architecture="Qwen3_5ForConditionalGeneration",
        vocab_size=248320,
        hidden_size=5120,
        intermediate_size=17408,
        num_hidden_layers=64,
        num_attention_heads=24,
        num_key_value_heads=4,
        head_dim=256,
        hidden_act="silu",
        max_position_embeddings=262144,
        rms_norm_eps=1e-6,
        rope_parameters=RopeParameters(
            rope_type="default",
            rope_theta=1e7,
            partial_rotary_factor=0.25,
            mrope_section=(11, 11, 10),
            mrope_interleaved=True,
        ),
        layer_types=(LINEAR, LINEAR, LINEAR, FULL) * 16,
        linear_num_value_heads=48,
        vision=tower(PUBLISHED),
    )
    assert (config.rotary_dim, config.num_mtp_layers, config.eos_token_id) == (64, 1, (248044,))
    assert read(PUBLISHED | {"architectures": ["Qwen3_5ForCausalLM"]}).layer_types == config.layer_types


def test_a_published_mixture_is_read_whole() -> None:
    text = changed(PUBLISHED, intermediate_size=GONE, **EXPERTS)
    config = read(wrapped(text, "Qwen3_5MoeForConditionalGeneration", model_type="qwen3_5_moe"))
    assert isinstance(config, Qwen3_5MoeConfig)
    assert (config.num_experts, config.shared_expert_intermediate_size, config.norm_topk_prob) == (256, 512, True)
    assert read(wrapped(text | {"norm_topk_prob": True}, "Qwen3_5MoeForConditionalGeneration")) == config
    assert all(config.is_sparse(layer) for layer in range(64))
    # a draft's experts and 17 other tensors, as counted in the published 35B-A3B
    one_by_one = {f"mtp.layers.0.mlp.experts.0.{part}_proj.weight": TensorType("BF16", ()) for part in ("up", "down")}
    names = {
        placement.tensor for spec in expand(RULES, config, Stage(mtp=True), one_by_one) for placement in spec.placements
    }
    assert sum(name.startswith("mtp.") for name in names) == 785


SPELLINGS = {
    "null layer types": changed(CONFIG, layer_types=None),
    "interval": changed(CONFIG, full_attention_interval=4),
    "layer types": changed(CONFIG, layer_types=[LINEAR, LINEAR, LINEAR, FULL], full_attention_interval=2),
    "partial outside": changed(
        CONFIG, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, partial_rotary_factor=0.5
    ),
    "theta outside": changed(
        CONFIG, rope_parameters=GONE, rope_theta=1e4, rope_scaling=None, partial_rotary_factor=0.5
    ),
    "sections": changed(CONFIG, rope_parameters=ROPE | {"mrope_section": [11, 11, 10], "mrope_interleaved": True}),
    "published constants": CONFIG
    | {key: PUBLISHED[key] for key in ("attn_output_gate", "mamba_ssm_dtype", "mtp_use_dedicated_embeddings")}
    | {"mlp_only_layers": None, "output_gate_type": "silu", "mtp_num_hidden_layers": 1, "num_mtp_layers": 1}
    | {"mtp_layer_types": [FULL]},
    "default beside another": changed(CONFIG, rope_parameters=ROPE, partial_rotary_factor=0.25),  # transformers 5.17
    "wrapped": wrapped(CONFIG, tie_word_embeddings=GONE),
    "eos as list": CONFIG | {"eos_token_id": [3, 4]},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_mean_the_same(spelling: str) -> None:
    found, want = read(SPELLINGS[spelling]), read(CONFIG)
    apart = {"architecture": 0, "eos_token_id": 0, "vision": 0}
    assert vars(found) | apart == vars(want) | apart


def test_defaults_are_the_familys() -> None:
    config = read(changed(CONFIG, rope_parameters={"rope_theta": 1e4}, head_dim=GONE))
    assert (config.head_dim, config.rotary_dim, config.rope_parameters.mrope_section) == (256, 64, (11, 11, 10))
    assert config.layer_types == (LINEAR, LINEAR, LINEAR, FULL)
    assert read(changed(CONFIG, full_attention_interval=3)).layer_types == (LINEAR, LINEAR, FULL, LINEAR)
    assert read(changed(CONFIG, mtp_num_hidden_layers=0)).num_mtp_layers == 0


@pytest.mark.parametrize("outside", [True, False])
def test_what_the_wrapper_says_of_the_whole_model_decides(outside: bool) -> None:
    document = wrapped(CONFIG | {"tie_word_embeddings": not outside}, tie_word_embeddings=outside, eos_token_id=5)
    config = read(document)
    assert config.tie_word_embeddings is outside
    assert config.eos_token_id == (5,)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (CONFIG | {"future_option": 3}, "option 'future_option' = 3 is not implemented"),
    "unknown key outside": (wrapped(CONFIG, future_option=3), "option 'future_option' = 3 is not implemented"),
    "unknown key inside": (wrapped(CONFIG | {"future_option": 3}), "option 'future_option' = 3 is not implemented"),
    "no text": (wrapped(CONFIG, text_config=GONE), "text_config is None, expected an object"),
    "quantised": (CONFIG | {"quantization_config": {"a": 1}}, "quant_method None is not implemented"),
    **{
        key: (CONFIG | {key: value}, f"option '{key}' = {value!r} is not implemented, expected")
        for key, value in {
            "attn_output_gate": False,
            "output_gate_type": "sigmoid",
            "mamba_ssm_dtype": "bfloat16",
            "mtp_use_dedicated_embeddings": True,
            "norm_topk_prob": False,
            "mlp_only_layers": [0],
            "decoder_sparse_step": 2,
        }.items()
    },
    "no width": (changed(CONFIG, intermediate_size=GONE), "intermediate_size is missing"),
    "zero width": (changed(CONFIG, intermediate_size=0), "intermediate_size is 0, expected at least 1"),
    "no size": (changed(CONFIG, vocab_size=GONE), "vocab_size is missing"),
    "size as text": (changed(CONFIG, hidden_size="8"), "hidden_size is '8', expected an integer"),
    "no taps": (CONFIG | {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim is 0, expected at least 1"),
    "more drafts than layers of any model": (
        CONFIG | {"mtp_num_hidden_layers": 10**9},
        "mtp_num_hidden_layers is 1000000000, expected 0 or more, at most 10000",
    ),
    "fewer than no drafts": (CONFIG | {"mtp_num_hidden_layers": -1}, "mtp_num_hidden_layers is -1, expected 0 or more"),
    "too deep": (changed(CONFIG, num_hidden_layers=10_001), "num_hidden_layers is 10001, expected at most 10000"),
    "heads": (
        changed(CONFIG, num_attention_heads=3, num_key_value_heads=2),
        "is not a multiple of num_key_value_heads=2",
    ),
    "linear heads": (
        CONFIG | {"linear_num_value_heads": 5, "linear_num_key_heads": 2},
        "linear_num_value_heads=5 is not a multiple of linear_num_key_heads=2",
    ),
    "odd rotation": (
        changed(CONFIG, rope_parameters=ROPE | {"partial_rotary_factor": 0.4}),
        "partial_rotary_factor=0.4 of head_dim=8 is 3 dimensions; rotary embedding needs pairs",
    ),
    "no rotation": (
        changed(CONFIG, rope_parameters=ROPE | {"partial_rotary_factor": 0.0}),
        "is 0 dimensions; rotary embedding needs pairs",
    ),
    "two parts of a head": (
        changed(CONFIG, rope_parameters=ROPE, partial_rotary_factor=0.75),
        "partial_rotary_factor=0.75 and 0.5 in rope_parameters disagree",
    ),
    "more than a head": (
        changed(CONFIG, rope_parameters=ROPE | {"partial_rotary_factor": 1.5}),
        "partial_rotary_factor=1.5, expected a part of 1",
    ),
    "more dimensions than numbers": (
        changed(CONFIG, rope_parameters=ROPE | {"partial_rotary_factor": 1e308}),
        "partial_rotary_factor=1e+308, expected a part of 1",
    ),
    "two sections": (
        changed(CONFIG, rope_parameters=ROPE | {"mrope_section": [1, 1]}),
        "mrope_section is [1, 1], expected three numbers",
    ),
    "in blocks": (
        changed(CONFIG, rope_parameters=ROPE | {"mrope_interleaved": False}),
        "'mrope_interleaved' = False is not implemented",
    ),
    "dynamic": (
        changed(CONFIG, rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 2.0}),
        "rope_type 'dynamic' is not implemented for Qwen3.5",
    ),
    "rope of no kind": (changed(CONFIG, rope_parameters=ROPE | {"rope_type": "longrope"}), "rope_type 'longrope'"),
    "rope as list": (changed(CONFIG, rope_parameters=[1]), "rope_parameters is [1], expected an object"),
    "two ropes": (
        CONFIG | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "disagree. Remove one.",
    ),
    "rope key": (changed(CONFIG, rope_parameters=ROPE | {"beta_fast": 2.0}), "rope option 'beta_fast' = 2.0"),
    "activation": (changed(CONFIG, hidden_act="gelu"), "hidden_act 'gelu' is not implemented, expected 'silu'"),
    "eps": (changed(CONFIG, rms_norm_eps=0.0), "rms_norm_eps is 0.0, expected more than 0"),
    "types too few": (CONFIG | {"layer_types": [FULL]}, "layer_types has 1 entries, expected num_hidden_layers=4"),
    "types unknown": (CONFIG | {"layer_types": [FULL] * 3 + ["sliding_attention"]}, "['sliding_attention'] are not"),
    "types of numbers": (CONFIG | {"layer_types": [1, 2, 3, 4]}, "layer_types is [1, 2, 3, 4], expected a list"),
    "interval": (CONFIG | {"full_attention_interval": 0}, "full_attention_interval is 0, expected an integer"),
    "interval as text": (CONFIG | {"full_attention_interval": "4"}, "full_attention_interval is '4', expected"),
    "two counts of drafts": (
        CONFIG | {"mtp_num_hidden_layers": 1, "num_mtp_layers": 2},
        "mtp_num_hidden_layers=1 and num_mtp_layers=2 disagree",
    ),
    "linear draft": (CONFIG | {"mtp_layer_types": [LINEAR]}, "mtp_layer_types ['linear_attention'] is not"),
    "experts": (changed(MOE, num_experts=GONE), "num_experts is missing"),
    "shared expert": (changed(MOE, shared_expert_intermediate_size=0), "shared_expert_intermediate_size is 0"),
    "choice": (changed(MOE, num_experts_per_tok=4), "num_experts_per_tok=4 of num_experts=3 cannot be chosen"),
    "attack": (changed(MOE, num_experts=10**6), "num_experts is 1000000, expected at most 1000000 in all layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(name: str) -> None:
    document, message = REFUSED[name]
    assert any(message in problem for problem in problems_of(document)), problems_of(document)


@pytest.mark.parametrize("value", [None, 3, "x", [], {}, [None], [[1]], -1, True, 1e300, {"a": {}}])
@pytest.mark.parametrize("base", [CONFIG, MOE, wrapped(CONFIG)])
def test_no_value_of_any_key_is_a_traceback(base: dict[str, Any], value: Any) -> None:
    for key in {*base, *PUBLISHED, "num_mtp_layers", "mtp_layer_types", "rope_scaling", "rope_theta"} - {
        "architectures"
    }:
        inner = base | {"text_config": CONFIG | {key: value}} if "text_config" in base else base | {key: value}
        for document in (inner, base | {key: value}):
            config, problems = config_from_json(document)
            assert (config is None) == bool(problems), (key, value)
    for key in (*ROPE, "mrope_section", "mrope_interleaved"):
        config, problems = config_from_json(changed(CONFIG, rope_parameters=ROPE | {key: value}))
        assert (config is None) == bool(problems), (key, value)


def test_all_problems_come_at_once() -> None:
    found = problems_of(CONFIG | {"one": 1, "two": 2, "attn_output_gate": False, "full_attention_interval": 0})
    assert len(found) >= 4


@pytest.mark.parametrize("is_moe", [False, True])
def test_transformers_own_config_is_read_as_it_means_it(is_moe: bool, tmp_path: Path) -> None:
    kinds = (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM) if is_moe else (Qwen3_5TextConfig, Qwen3_5ForCausalLM)
    base = MOE if is_moe else CONFIG
    options = {key: value for key, value in base.items() if key not in ("architectures", "model_type")}
    model = kinds[1](kinds[0](**options, linear_num_key_heads=1, linear_num_value_heads=2, pad_token_id=None))
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    config, theirs = checkpoint.config, model.config
    ours_alone = {"architecture", "rope_parameters", "layer_types", "eos_token_id", "quantization", "vision"}
    for name in vars(read(base)).keys() - ours_alone:
        if name != "mtp_num_hidden_layers" and not (is_moe and name == "intermediate_size"):
            assert getattr(config, name) == getattr(theirs, name), name
    assert list(config.layer_types) == theirs.layer_types
    assert theirs.rope_parameters["partial_rotary_factor"] == config.rope_parameters.partial_rotary_factor == 0.5
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    specs = expand(RULES, config, None, checkpoint.tensors)
    assert {placement.tensor: spec.tensor_shape for spec in specs for placement in spec.placements} == shapes
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["architectures"] == [f"Qwen3_5{'Moe' if is_moe else ''}ForCausalLM"]


def test_every_field_is_read_by_someone() -> None:
    read_somewhere = names_read()
    assert {name for name in vars(read(MOE)) if name not in read_somewhere} == set()
