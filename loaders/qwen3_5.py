"""Qwen3.5, dense and mixture of experts, alone or inside the multimodal wrapper: config.json and tensors as published.

Source: transformers ``Qwen3_5TextConfig``, ``Qwen3_5MoeTextConfig`` and the models' saved names (5.23); the draft's
names (``mtp.*``), which transformers leaves out, are those of the published checkpoints.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from loaders.checks import (
    MOST_LAYERS,
    expert_problems,
    layer_type_problems,
    multiple_problems,
    only_problems,
    positive_problems,
    size_problems,
)
from loaders.config import (
    PARTIAL_KEYS,
    UNREAD_ROPE,
    RopeParameters,
    read_config,
    read_rope,
    refused_keys,
    with_rope_defaults,
)
from loaders.errors import brief
from loaders.expert_rules import expert_rules
from loaders.quantization.schemes import Quantization
from loaders.spec import Dim, Rule, always
from loaders.vision import WRAPPER_KEYS, VisionConfig, read_vision, vision_rules

FULL, LINEAR = "full_attention", "linear_attention"
DEFAULT_INTERVAL, DEFAULT_PARTIAL = 4, 0.25
DEFAULT_SECTION = [11, 11, 10]
DEFAULT_IMAGE, DEFAULT_VIDEO = 248056, 248057
WRAPPERS = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
# Keys whose one implemented value is what the published models have.
FIXED: dict[str, tuple[Any, ...]] = {
    "attn_output_gate": (True,),
    "output_gate_type": ("swish", "silu"),  # of the gated norm in linear attention
    "mamba_ssm_dtype": ("float32",),
    "mtp_use_dedicated_embeddings": (False,),
    "norm_topk_prob": (True,),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1,),
}


@dataclass(frozen=True, kw_only=True)
class Qwen3_5Config:
    """The text part of config.json of Qwen3_5ForCausalLM and its wrapper. Letters: docs/glossary.md."""

    architecture: str
    vocab_size: int  # V
    hidden_size: int  # D
    num_hidden_layers: int  # L
    num_attention_heads: int  # N
    num_key_value_heads: int  # K
    head_dim: int  # H
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: RopeParameters
    layer_types: tuple[str, ...]
    linear_conv_kernel_dim: int = 4  # W
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    mtp_num_hidden_layers: int = 1
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    intermediate_size: int = 0  # F; a mixture of experts has none
    # how generation ends is not what the model computes: two configs that differ here are equal
    eos_token_id: tuple[int, ...] = field(default=(), compare=False)
    pad_token_id: int | None = field(default=None, compare=False)
    quantization: Quantization | None = None  # of the whole checkpoint, not a key of this document
    vision: VisionConfig | None = None  # of the wrapper

    is_multi_axis = True

    @property
    def is_wrapped(self) -> bool:
        """Whether the text model stands inside the multimodal one."""
        return self.architecture in WRAPPERS

    @property
    def text_paths(self) -> tuple[str, ...]:
        # the text class is exported under the wrapper's names too (modelopt), and published so
        return ("model.language_model",) if self.is_wrapped else ("model", "model.language_model")

    @property
    def is_recurrent(self) -> bool:
        return LINEAR in self.layer_types

    @property
    def needs_whole_rows(self) -> bool:
        """A state goes by masked tokens, as its convolution does."""
        return self.is_recurrent

    @property
    def num_mtp_layers(self) -> int:
        return self.mtp_num_hidden_layers

    @property
    def key_dim(self) -> int:
        """Width of all linear-attention keys."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of all linear-attention values."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that turn: the first so many."""
        return int(self.head_dim * self.rope_parameters.partial_rotary_factor)

    def has_linear_attention(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` is a gated delta net."""
        return self.layer_types[layer] == LINEAR

    def is_sparse(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` routes to experts."""
        return False

    def rope(self, layer: int) -> RopeParameters:
        """Rotary embedding of ``layer``: one for all."""
        return self.rope_parameters

    def window(self, layer: int) -> int | None:
        """Keys a query of ``layer`` sees: all."""
        return None

    def dims(self) -> dict[str, Dim]:
        n, k, h = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        keys = f"linear_num_key_heads={self.linear_num_key_heads}, linear_key_head_dim={self.linear_key_head_dim}"
        values = (
            f"linear_num_value_heads={self.linear_num_value_heads}, linear_value_head_dim={self.linear_value_head_dim}"
        )
        key = Dim(self.key_dim, keys, units=self.linear_num_key_heads)
        value = Dim(self.value_dim, values, units=self.linear_num_value_heads)
        return {
            "V": Dim(self.vocab_size, "vocab_size"),
            "D": Dim(self.hidden_size, "hidden_size"),
            "2D": Dim(2 * self.hidden_size, "hidden_size"),
            "F": Dim(self.intermediate_size, "intermediate_size"),
            "H": Dim(h, "head_dim"),
            "N2H": Dim(2 * n * h, f"num_attention_heads={n}, head_dim={h}, a query and its gate per head", units=n),
            "NH": Dim(n * h, f"num_attention_heads={n}, head_dim={h}", units=n),
            "KH": Dim(k * h, f"num_key_value_heads={k}, head_dim={h}", units=k),
            "QKV": Dim(2 * self.key_dim + self.value_dim, f"{keys}, {values}", segments=(key, key, value)),
            "LV": value,
            "LN": Dim(self.linear_num_value_heads, "linear_num_value_heads"),
            "LH": Dim(self.linear_value_head_dim, "linear_value_head_dim"),
            "W": Dim(self.linear_conv_kernel_dim, "linear_conv_kernel_dim"),
            **({} if self.vision is None else self.vision.dims()),
        }

    def problems(self) -> list[str]:
        """What this configuration asks for and cannot have, one sentence each."""
        may_be_less = {"mtp_num_hidden_layers"} | (
            {"intermediate_size"} if isinstance(self, Qwen3_5MoeConfig) else set()
        )
        if found := size_problems(self, may_be_less):
            return found
        found = multiple_problems(
            num_attention_heads=self.num_attention_heads, num_key_value_heads=self.num_key_value_heads
        )
        found += multiple_problems(
            linear_num_value_heads=self.linear_num_value_heads, linear_num_key_heads=self.linear_num_key_heads
        )
        partial, section = self.rope_parameters.partial_rotary_factor, self.rope_parameters.mrope_section or ()
        if not 0 <= partial <= 1:
            found.append(f"config.json: partial_rotary_factor={partial}, expected a part of 1")
        elif self.rotary_dim % 2 or not self.rotary_dim:
            turned = f"partial_rotary_factor={partial} of head_dim={self.head_dim}"
            found.append(f"config.json: {turned} is {self.rotary_dim} dimensions; rotary embedding needs pairs")
        if len(section) != 3 or min(section, default=0) < 0:
            found.append(f"config.json: mrope_section is {list(section)}, expected three numbers of pairs")
        if not self.rope_parameters.mrope_interleaved:
            found.append("config.json: rope option 'mrope_interleaved' = False is not implemented, expected True")
        if self.rope_parameters.is_dynamic:
            found.append("config.json: rope_type 'dynamic' is not implemented for Qwen3.5")
        found += only_problems("hidden_act", self.hidden_act, "silu")
        if not 0 <= self.mtp_num_hidden_layers <= MOST_LAYERS:
            bounds = f"expected 0 or more, at most {MOST_LAYERS}"
            found.append(f"config.json: mtp_num_hidden_layers is {self.mtp_num_hidden_layers}, {bounds}")
        if self.vision is not None:
            found += self.vision.problems(self.hidden_size)
        return found + positive_problems(rms_norm_eps=self.rms_norm_eps) + layer_type_problems(self, FULL, LINEAR)


@dataclass(frozen=True, kw_only=True)
class Qwen3_5MoeConfig(Qwen3_5Config):
    """The text part of config.json of Qwen3_5MoeForCausalLM and its wrapper: every layer routes."""

    num_experts: int  # E
    num_experts_per_tok: int  # X
    moe_intermediate_size: int  # M
    shared_expert_intermediate_size: int

    norm_topk_prob = True  # always, whatever other families let the config say

    def is_sparse(self, layer: int) -> bool:
        return True

    def dims(self) -> dict[str, Dim]:
        return {
            **super().dims(),
            "E": Dim(self.num_experts, "num_experts"),
            "M": Dim(self.moe_intermediate_size, "moe_intermediate_size"),
            "2M": Dim(2 * self.moe_intermediate_size, "moe_intermediate_size"),
            "SF": Dim(self.shared_expert_intermediate_size, "shared_expert_intermediate_size"),
        }

    def problems(self) -> list[str]:
        return super().problems() + expert_problems(self)


def config_from_json(architecture: str, document: dict[str, Any]) -> tuple[Qwen3_5Config | None, list[str]]:
    """Read config.json of any of the four architectures; None and every problem when it cannot be."""
    problems: list[str] = []
    text, vision = document, None
    if architecture in WRAPPERS:
        text = document.get("text_config")
        if not isinstance(text, dict):
            return None, [f"config.json: text_config is {brief(text)}, expected an object"]
        vision, more = read_vision(document, image_token_id=DEFAULT_IMAGE, video_token_id=DEFAULT_VIDEO)
        problems += more + refused_keys(document, set(WRAPPER_KEYS) | {"eos_token_id", "pad_token_id"})
        outer = {key: document[key] for key in ("eos_token_id", "pad_token_id") if document.get(key) is not None}
        # the whole model is tied or not; what the text model says of itself is not read
        tied = document.get("tie_word_embeddings")
        text = {**text, **outer, "tie_word_embeddings": False if tied is None else tied}
    spelled = {key: value for key, value in text.items() if key not in ("rope_theta", "rope_scaling")}
    for key, known in FIXED.items():
        if key in spelled and (value := spelled.pop(key)) is not None and value not in known:
            option = f"option {key!r} = {brief(value)}"
            problems.append(f"config.json: {option} is not implemented, expected {known[0]!r}")
    partial = spelled.pop("partial_rotary_factor", None)
    defaults = {
        "partial_rotary_factor": DEFAULT_PARTIAL if partial is None else partial,
        "mrope_section": DEFAULT_SECTION,
        "mrope_interleaved": True,
    }
    rope, more = read_rope(with_rope_defaults(text, defaults), PARTIAL_KEYS)
    problems += more
    # transformers writes its default beside whatever rope_parameters says, and goes by those
    is_said = partial is not None and partial != DEFAULT_PARTIAL
    if is_said and rope is not None and rope.partial_rotary_factor != partial:
        both = f"partial_rotary_factor={brief(partial)} and {rope.partial_rotary_factor} in rope_parameters"
        problems.append(f"config.json: {both} disagree. Remove one.")
    spelled |= {"architecture": architecture, "vision": vision}
    spelled["rope_parameters"] = UNREAD_ROPE if rope is None else rope
    if isinstance(spelled.get("eos_token_id"), int):
        spelled["eos_token_id"] = [spelled["eos_token_id"]]
    if spelled.get("head_dim") is None:
        spelled["head_dim"] = 256
    other = spelled.pop("num_mtp_layers", None)  # how transformers' own draft is asked for
    if other is not None and spelled.setdefault("mtp_num_hidden_layers", other) != other:
        both = f"mtp_num_hidden_layers={brief(spelled['mtp_num_hidden_layers'])} and num_mtp_layers={brief(other)}"
        problems.append(f"config.json: {both} disagree")
    kinds = spelled.pop("mtp_layer_types", None)
    if kinds is not None and (not isinstance(kinds, list) or any(kind != FULL for kind in kinds)):
        problems.append(f"config.json: mtp_layer_types {brief(kinds)} is not implemented, expected only {FULL}")
    interval = spelled.pop("full_attention_interval", None)
    if spelled.get("layer_types") is None:
        types, more = _layer_types(spelled.get("num_hidden_layers"), DEFAULT_INTERVAL if interval is None else interval)
        problems += more
        spelled["layer_types"] = types
    is_moe = "Moe" in architecture
    if is_moe:
        spelled.pop("intermediate_size", None)  # of dense layers, which it has none of
    elif spelled.get("intermediate_size") is None:
        problems.append("config.json: intermediate_size is missing. Is the file complete?")
        spelled["intermediate_size"] = 1
    config, more = read_config(Qwen3_5MoeConfig if is_moe else Qwen3_5Config, spelled)
    problems += more
    return (None if problems else config), problems


def _layer_types(layers: Any, interval: Any) -> tuple[list[str], list[str]]:
    """What a config.json without layer_types means: every ``interval``-th layer attends in full."""
    if type(interval) is not int or interval < 1:
        return [], [f"config.json: full_attention_interval is {brief(interval)}, expected an integer of at least 1"]
    if type(layers) is not int or layers > MOST_LAYERS:
        return [], []  # reported as missing or as too many
    return [LINEAR if (layer + 1) % interval else FULL for layer in range(layers)], []


def _linear(config: Qwen3_5Config, layer: int) -> bool:
    return config.has_linear_attention(layer)


def _full(config: Qwen3_5Config, layer: int) -> bool:
    return not config.has_linear_attention(layer)


def _dense(config: Qwen3_5Config, layer: int) -> bool:
    return not config.is_sparse(layer)


def _sparse(config: Qwen3_5Config, layer: int) -> bool:
    return config.is_sparse(layer)


def _layer_rules(prefix: str, on: Any) -> tuple[Rule, ...]:
    """A decoder layer of the model, or of the draft, whose layers all attend in full."""
    attn, mlp, linear = prefix + "self_attn.", prefix + "mlp.", prefix + "linear_attn."
    full = always if on == "mtp" else _full

    def biased(config: Qwen3_5Config, layer: int) -> bool:
        return config.attention_bias and full(config, layer)

    mixer = (
        ()
        if on == "mtp"
        else tuple(
            Rule(linear + name, dims, when=_linear, is_gate=dims == "LN D")
            for name, dims in (
                ("in_proj_qkv.weight", "QKV D"),
                ("in_proj_z.weight", "LV D"),
                ("in_proj_b.weight", "LN D"),
                ("in_proj_a.weight", "LN D"),
                ("conv1d.weight", "QKV 1 W"),
                ("dt_bias", "LN"),
                ("A_log", "LN"),
                ("norm.weight", "LH"),
                ("out_proj.weight", "D LV"),
            )
        )
    )
    return (
        Rule(prefix + "input_layernorm.weight", "D", on=on, zero_centred=True),
        *mixer,
        Rule(attn + "q_proj.weight", "N2H D", on=on, when=full),
        Rule(attn + "k_proj.weight", "KH D", on=on, when=full),
        Rule(attn + "v_proj.weight", "KH D", on=on, when=full),
        Rule(attn + "o_proj.weight", "D NH", on=on, when=full),
        Rule(attn + "q_proj.bias", "N2H", on=on, when=biased),
        Rule(attn + "k_proj.bias", "KH", on=on, when=biased),
        Rule(attn + "v_proj.bias", "KH", on=on, when=biased),
        Rule(attn + "o_proj.bias", "D", on=on, when=biased),
        Rule(attn + "q_norm.weight", "H", on=on, when=full, zero_centred=True),
        Rule(attn + "k_norm.weight", "H", on=on, when=full, zero_centred=True),
        Rule(prefix + "post_attention_layernorm.weight", "D", on=on, zero_centred=True),
        Rule(mlp + "gate_proj.weight", "F D", on=on, when=_dense),
        Rule(mlp + "up_proj.weight", "F D", on=on, when=_dense),
        Rule(mlp + "down_proj.weight", "D F", on=on, when=_dense),
        Rule(mlp + "gate.weight", "E D", on=on, when=_sparse, is_router=True),
        # published fused, output-major
        *expert_rules(mlp + "experts.", prefers_transposed=False, when=_sparse, on=on),
        Rule(mlp + "shared_expert.gate_proj.weight", "SF D", on=on, when=_sparse),
        Rule(mlp + "shared_expert.up_proj.weight", "SF D", on=on, when=_sparse),
        Rule(mlp + "shared_expert.down_proj.weight", "D SF", on=on, when=_sparse),
        Rule(mlp + "shared_expert_gate.weight", "1 D", on=on, when=_sparse, is_gate=True),
    )


RULES: tuple[Rule, ...] = (
    Rule("{text}.embed_tokens.weight", "V D", on="embedding"),
    *_layer_rules("{text}.layers.{layer}.", "layer"),
    Rule("{text}.norm.weight", "D", on="last", zero_centred=True),
    Rule("lm_head.weight", "V D", on="head", tied_to="{text}.embed_tokens.weight"),
    Rule("mtp.fc.weight", "D 2D", on="mtp"),
    Rule("mtp.pre_fc_norm_embedding.weight", "D", on="mtp", zero_centred=True),
    Rule("mtp.pre_fc_norm_hidden.weight", "D", on="mtp", zero_centred=True),
    *_layer_rules("mtp.layers.{layer}.", "mtp"),
    Rule("mtp.norm.weight", "D", on="mtp", zero_centred=True),
    *vision_rules(),
)
LEFT_OUT: tuple[re.Pattern[str], ...] = (
    re.compile(r"mtp\..*"),  # unless the draft is asked for
    re.compile(r"(model\.)?visual\..*"),  # the vision tower, where there is none or nobody wants it
)
