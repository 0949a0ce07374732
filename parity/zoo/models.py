"""The models of the zoo: small configurations of every architecture, in both spellings of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from loaders import dtypes
from loaders.spec import Form

Spelling = Literal["v5", "hub"]


@dataclass(frozen=True)
class ZooModel:
    """One architecture and its config.json, under the names our config classes use.

    Attributes:
        architecture: as in config.json.
        model_type: as in config.json; of the text model.
        config: of the text model.
        spelled_v5: keys where transformers 5 writes other names than published checkpoints have.
        gains: what the zoo scales weights by where the family needs something else.
        experts: form of the experts, then of the draft's.
        wrapper: config.json of the multimodal model around ``config``.
    """

    architecture: str
    model_type: str
    config: Mapping[str, Any]
    spelled_v5: Mapping[str, str] = field(default_factory=dict)
    gains: Mapping[str, float] = field(default_factory=dict)
    experts: tuple[Form, Form] = ("per expert", "per expert")
    wrapper: Mapping[str, Any] = field(default_factory=dict)


# head_dim is not hidden / heads, heads over groups is odd or 2, q's width is not hidden_size; nothing divides by 16
_DENSE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "max_window_layers": 4,
    "rms_norm_eps": 3e-4,  # 1e-6, as published, beside a residual stream of 1 is less than float32 shows
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_YARN = {"rope_type": "yarn", "rope_theta": 50000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
_MIXED = [_SLIDING, _FULL, _SLIDING, _FULL]
_SMALL = {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6}
_MOE = {
    **{key: value for key, value in _DENSE.items() if key != "max_window_layers"},
    "head_dim": 16,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
_COMMON = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "attention_bias"),
    *("attention_dropout", "initializer_range", "tie_word_embeddings", "use_cache", "bos_token_id", "eos_token_id"),
)
_EXPERTS = (
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers"),
    *("output_router_logits", "router_aux_loss_coef"),
)
_QWEN3_5 = {
    **{key: _DENSE[key] for key in (*_COMMON, "hidden_act")},
    "head_dim": 16,
    # 6 of 8 pairs turn: by T H W T H and T again, as width has one pair alone
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 50000.0,
        "partial_rotary_factor": 0.75,
        "mrope_section": [3, 2, 1],
        "mrope_interleaved": True,
    },
    "layer_types": [_LINEAR, _LINEAR, _FULL, _LINEAR],
    "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 14,
    "linear_value_head_dim": 7,
    "mtp_num_hidden_layers": 1,
}
_QWEN3_5_MOE = {
    **{key: value for key, value in _QWEN3_5.items() if key != "intermediate_size"},
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 28,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
_GATED = {"D NH": 3.5, "D LV": 2.5}  # a gate halves what attention says
VISION = {
    "depth": 1,
    "hidden_size": 24,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 36,
    "num_heads": 3,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 36,
}
# two levels of four blocks, the first not the first; heads of 12 turn by 3 pairs each way
_DEEP_VISION = {**VISION, "depth": 3, "hidden_size": 36, "intermediate_size": 44, "deepstack_visual_indexes": [0, 2]}
_GEMMA3 = {
    **{key: _DENSE[key] for key in _COMMON},
    "hidden_size": 42,  # transformers wants a multiple of the heads
    "num_hidden_layers": 5,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 14,  # not head_dim
    "sliding_window": 24,
    "layer_types": [_SLIDING, _SLIDING, _FULL, _SLIDING, _SLIDING],
    "rope_parameters": {
        _FULL: {"rope_type": "default", "rope_theta": 50000.0},
        _SLIDING: {"rope_type": "default", "rope_theta": 1000.0},
    },
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "tie_word_embeddings": True,
}
# the embedding is a tied head's and enters times sqrt(hidden_size): branches have to be as large
_LOUD = {"post_attention_layernorm": 2.2, "post_feedforward_layernorm": 2.2}


def _dense(**changes: Any) -> ZooModel:
    return ZooModel("Qwen3ForCausalLM", "qwen3", _DENSE | changes)


def _moe(**changes: Any) -> ZooModel:
    return ZooModel("Qwen3MoeForCausalLM", "qwen3_moe", _MOE | changes, {"num_experts": "num_local_experts"})


def _hybrid(**changes: Any) -> ZooModel:
    return ZooModel("Qwen3_5ForCausalLM", "qwen3_5_text", _QWEN3_5 | changes, gains=_GATED)


def _wrapper(model_type: str, vision: Mapping[str, Any] = VISION) -> dict[str, Any]:
    """config.json around the text model."""
    tower = {"model_type": model_type, **vision}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {"model_type": model_type, "vision_config": tower, **{name: 203 + i for i, name in enumerate(names)}}


def _seeing(kind: str, text: Mapping[str, Any], **changes: Any) -> ZooModel:
    """Qwen3-VL; half of the pairs of a head turn by height or width."""
    rope = {"rope_type": "default", "rope_theta": 50000.0, "mrope_section": [2, 2, 1], "mrope_interleaved": True}
    config = {key: value for key, value in text.items() if key in {*_COMMON, "hidden_act", *_EXPERTS}}
    model_type = "qwen3_vl_moe" if kind else "qwen3_vl"
    return ZooModel(
        f"Qwen3VL{kind}ForConditionalGeneration",
        f"{model_type}_text",
        config | {"head_dim": 10, "rope_parameters": rope} | changes,
        {"num_experts": "num_local_experts"} if kind else {},
        experts=("fused transposed", "per expert"),  # the experts as published; there is no draft
        wrapper=_wrapper(model_type, _DEEP_VISION),
    )


def _gemma3(**changes: Any) -> ZooModel:
    return ZooModel("Gemma3ForCausalLM", "gemma3_text", _GEMMA3 | changes, gains=_LOUD)


ZOO: dict[str, ZooModel] = {
    "qwen3": _dense(),
    "qwen3-tied": _dense(tie_word_embeddings=True),
    "qwen3-bias": _dense(attention_bias=True),
    "qwen3-sliding": _dense(use_sliding_window=True, sliding_window=24, layer_types=_MIXED),
    "qwen3-yarn": _dense(max_position_embeddings=256, rope_parameters=_YARN, head_dim=16),
    "qwen3-deep": _dense(**_SMALL, num_hidden_layers=12),  # layer 10 sorts before layer 2 as text
    "qwen3-moe": _moe(),
    "qwen3-moe-nonorm": _moe(norm_topk_prob=False, decoder_sparse_step=2, mlp_only_layers=[], tie_word_embeddings=True),
    "qwen3_5": _hybrid(),
    "qwen3_5-tied": _hybrid(tie_word_embeddings=True),
    "qwen3_5-moe": ZooModel(
        "Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", _QWEN3_5_MOE, gains=_GATED, experts=("fused", "fused")
    ),
    "qwen3_5-wrapped": ZooModel(
        "Qwen3_5ForConditionalGeneration", "qwen3_5_text", _QWEN3_5, gains=_GATED, wrapper=_wrapper("qwen3_5")
    ),
    "qwen3_5-moe-wrapped": ZooModel(
        "Qwen3_5MoeForConditionalGeneration",
        "qwen3_5_moe_text",
        _QWEN3_5_MOE,
        gains=_GATED,
        experts=("fused", "per expert"),  # as the 35B-A3B is published
        wrapper=_wrapper("qwen3_5_moe"),
    ),
    "qwen3_vl": _seeing("", _DENSE),
    "qwen3_vl-moe": _seeing("Moe", _MOE, tie_word_embeddings=True),
    "gemma3": _gemma3(),
    "gemma3-capped": _gemma3(
        attn_logit_softcapping=4.0,
        final_logit_softcapping=12.0,
        rope_parameters=_GEMMA3["rope_parameters"]
        | {_FULL: {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}},
    ),
}


def zoo_config(name: str, *, spelling: Spelling = "v5", dtype: str = "F32", **config_overrides: Any) -> dict[str, Any]:
    """config.json of a zoo model.

    Args:
        name: key of ``ZOO``.
        spelling: ``"v5"`` as transformers 5 writes it (``rope_parameters``, ``dtype``), ``"hub"`` as published
            checkpoints do (``rope_theta``, ``rope_scaling``, ``torch_dtype``).
        dtype: safetensors name of what the weights will be stored in.
        config_overrides: keys of the zoo entry to change, ``rope_parameters`` included; of the text model.
    """
    model = ZOO[name]
    text = {"model_type": model.model_type, **model.config, **config_overrides}
    dtype_name = dtypes.to_numpy(dtype).name
    version = "5.23.0" if spelling == "v5" else "4.51.0"
    if spelling == "v5":
        text = {model.spelled_v5.get(key, key): value for key, value in text.items()} | {"dtype": dtype_name}
    else:
        text = _as_published(text) | {"torch_dtype": dtype_name}
    if not model.wrapper:
        return {"architectures": [model.architecture], **text, "transformers_version": version}
    tower = {"vision_config": model.wrapper["vision_config"] | {"out_hidden_size": text["hidden_size"]}}
    outer = {"tie_word_embeddings": text["tie_word_embeddings"], "transformers_version": version}
    return {"architectures": [model.architecture], **model.wrapper, **tower, "text_config": text, **outer}


def _as_published(config: dict[str, Any]) -> dict[str, Any]:
    rope = dict(config.pop("rope_parameters"))
    if _FULL in rope:  # Gemma 3: the global layers' parameters plain, the local ones a base alone
        every = config["layer_types"].index(_FULL) + 1
        config |= {"rope_local_base_freq": rope[_SLIDING]["rope_theta"], "sliding_window_pattern": every}
        del config["layer_types"]
        rope = dict(rope[_FULL])
    if "partial_rotary_factor" in rope:  # Qwen3.5 was published with rope_parameters already
        published = {"partial_rotary_factor": rope["partial_rotary_factor"], "full_attention_interval": 4}
        fixed = {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "mtp_use_dedicated_embeddings": False}
        return config | published | fixed | {"mlp_only_layers": [], "rope_parameters": rope}
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    return config
