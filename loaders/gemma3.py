"""Gemma 3, text: config.json and the checkpoint's tensors, as published on Hugging Face.

Source: transformers ``Gemma3TextConfig`` and the model's saved names (5.23).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from loaders.checks import (
    MOST_LAYERS,
    layer_type_problems,
    multiple_problems,
    only_problems,
    positive_problems,
    size_problems,
)
from loaders.config import RopeParameters, read_config, read_rope
from loaders.errors import brief
from loaders.quantization.schemes import Quantization
from loaders.spec import Dim, Rule

FULL, SLIDING = "full_attention", "sliding_attention"
THETA = {FULL: 1_000_000.0, SLIDING: 10_000.0}
DEFAULT_PATTERN = 6  # every so many layers one attends in full
DEFAULT_WINDOW = 4096


@dataclass(frozen=True, kw_only=True)
class Gemma3Config:
    """config.json of Gemma3ForCausalLM. Letters: docs/glossary.md."""

    architecture: str
    vocab_size: int = 262_208  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int = 8  # N
    num_key_value_heads: int = 4  # K
    head_dim: int = 256  # H
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 131_072
    rms_norm_eps: float = 1e-6
    full_attention_rope: RopeParameters
    sliding_attention_rope: RopeParameters
    layer_types: tuple[str, ...]
    sliding_window: int = DEFAULT_WINDOW  # keys a query sees, itself included
    query_pre_attn_scalar: float = 256.0  # scores are divided by its root
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    eos_token_id: tuple[int, ...] = field(default=(1,), compare=False)
    pad_token_id: int | None = field(default=0, compare=False)
    quantization: Quantization | None = None  # of the whole checkpoint, not a key of this document

    text_paths = ("model",)
    num_mtp_layers = 0
    vision = None
    is_multi_axis = False
    is_recurrent = False

    @property
    def needs_whole_rows(self) -> bool:
        """A window counts masked tokens."""
        return SLIDING in self.layer_types

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that turn: all."""
        return self.head_dim

    def rope(self, layer: int) -> RopeParameters:
        """Rotary embedding of ``layer``: sliding and global layers have their own."""
        return self.sliding_attention_rope if self.layer_types[layer] == SLIDING else self.full_attention_rope

    def window(self, layer: int) -> int | None:
        """Keys a query of ``layer`` sees, itself included; None for all."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    def dims(self) -> dict[str, Dim]:
        n, k, h = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        return {
            "V": Dim(self.vocab_size, "vocab_size"),
            "D": Dim(self.hidden_size, "hidden_size"),
            "F": Dim(self.intermediate_size, "intermediate_size"),
            "H": Dim(h, "head_dim"),
            "NH": Dim(n * h, f"num_attention_heads={n}, head_dim={h}", units=n),
            "KH": Dim(k * h, f"num_key_value_heads={k}, head_dim={h}", units=k),
        }

    def problems(self) -> list[str]:
        """What this configuration asks for and cannot have, one sentence each."""
        if found := size_problems(self):
            return found
        found = multiple_problems(
            num_attention_heads=self.num_attention_heads, num_key_value_heads=self.num_key_value_heads
        )
        if self.head_dim % 2:
            found.append(f"config.json: head_dim={self.head_dim} is odd; rotary embedding needs pairs")
        found += only_problems("hidden_activation", self.hidden_activation, "gelu_pytorch_tanh")
        found += positive_problems(
            rms_norm_eps=self.rms_norm_eps,
            query_pre_attn_scalar=self.query_pre_attn_scalar,
            attn_logit_softcapping=self.attn_logit_softcapping,
            final_logit_softcapping=self.final_logit_softcapping,
        )
        if self.full_attention_rope.is_dynamic or self.sliding_attention_rope.is_dynamic:
            found.append("config.json: rope_type 'dynamic' is not implemented for Gemma 3")
        return found + layer_type_problems(self, FULL, SLIDING)


def config_from_json(architecture: str, document: dict[str, Any]) -> tuple[Gemma3Config | None, list[str]]:
    """Read config.json in either spelling; None and every problem when it cannot be."""
    ropes, problems = _ropes(document)
    nested = ("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq")
    spelled = {key: value for key, value in document.items() if key not in nested}
    spelled["architecture"] = architecture
    default = RopeParameters(rope_type="default", rope_theta=1e4)
    for kind in (FULL, SLIDING):
        spelled[f"{kind}_rope"] = ropes.get(kind, default)
    eos = document.get("eos_token_id", 1)
    spelled["eos_token_id"] = [] if eos is None else [eos] if isinstance(eos, int) else eos  # null: nothing ends a row
    if bidirectional := spelled.pop("use_bidirectional_attention", None):
        found = f"option 'use_bidirectional_attention' = {brief(bidirectional)}"
        problems.append(f"config.json: {found} is not implemented, expected False")
    if (kept := spelled.pop("cache_implementation", None)) not in (None, "hybrid"):
        problems.append(f"config.json: cache_implementation {brief(kept)} is not known, expected 'hybrid'")
    private = spelled.pop("_sliding_window_pattern", None)  # which transformers writes, and does not read
    pattern = spelled.pop("sliding_window_pattern", None)
    pattern = DEFAULT_PATTERN if pattern is None else pattern
    if type(private) is int and private != pattern and spelled.get("layer_types") is None:
        read = f"transformers reads {brief(pattern)} then. Give layer_types"
        problems.append(f"config.json: _sliding_window_pattern is {brief(private)} without layer_types: {read}")
    for key, given in (("sliding_window_pattern", pattern), ("_sliding_window_pattern", private)):
        if given is not None and (type(given) is not int or given < 1):
            problems.append(f"config.json: {key} is {brief(given)}, expected an integer of at least 1")
            pattern = DEFAULT_PATTERN
    if spelled.get("layer_types") is None:
        layers = spelled.get("num_hidden_layers")
        few = layers if isinstance(layers, int) and layers <= MOST_LAYERS else 0
        spelled["layer_types"] = [SLIDING if (layer + 1) % pattern else FULL for layer in range(few)]
    config, more = read_config(Gemma3Config, spelled)
    problems += more
    if SLIDING in spelled["layer_types"] and document.get("sliding_window", DEFAULT_WINDOW) is None:
        problems.append("config.json: layer_types asks for sliding_attention, but sliding_window is null")
    return (None if problems else config), problems


def _ropes(document: dict[str, Any]) -> tuple[dict[str, RopeParameters], list[str]]:
    """Rotary parameters of both kinds of layers: nested by kind, or the global ones plain beside the local base."""
    nested, scaling = document.get("rope_parameters"), document.get("rope_scaling")
    theta, local = document.get("rope_theta"), document.get("rope_local_base_freq")
    problems: list[str] = []
    if nested is not None and not (isinstance(nested, dict) and set(nested) <= {FULL, SLIDING}):
        problems.append(f"config.json: rope_parameters is {brief(nested)}, expected an object of {FULL} and {SLIDING}")
        nested = None
    if scaling is not None and not isinstance(scaling, dict):
        problems.append(f"config.json: rope_scaling is {brief(scaling)}, expected an object")
        scaling = None
    found: dict[str, RopeParameters] = {}
    for kind, base, factor in ((FULL, theta, scaling), (SLIDING, local, None)):
        given = (nested or {}).get(kind) or {}
        if not isinstance(given, dict):
            problems.append(f"config.json: rope_parameters[{kind!r}] is {brief(given)}, expected an object")
            continue
        given = dict(given)
        for key, value in (factor or {}).items():  # with `type` too, beside which transformers keeps its default
            if given.setdefault(key, value) != value:
                problems.append(f"config.json: rope_scaling and rope_parameters[{kind!r}] disagree about {brief(key)}")
        if base is not None and given.setdefault("rope_theta", base) != base:
            problems.append(f"config.json: two bases for {kind}: {brief(base)} and {brief(given['rope_theta'])}")
        given.setdefault("rope_theta", THETA[kind])
        if given.get("truncate") is False:  # which transformers looks for beside the kinds: there it counts as true
            problems.append(f"config.json: rope option truncate is false for {kind}, which transformers does not read")
        longest = document.get("max_position_embeddings", Gemma3Config.max_position_embeddings)
        rope, more = read_rope({"rope_parameters": given, "max_position_embeddings": longest})
        problems += [f"{problem} ({kind})" for problem in more]
        if rope is not None:
            found[kind] = rope
    return found, problems


def _biased(config: Gemma3Config, layer: int) -> bool:
    return config.attention_bias


_LAYER = "{text}.layers.{layer}."
_ATTN = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."

RULES: tuple[Rule, ...] = (
    Rule("{text}.embed_tokens.weight", "V D", on="embedding"),
    Rule(_LAYER + "input_layernorm.weight", "D", zero_centred=True),
    Rule(_ATTN + "q_proj.weight", "NH D"),
    Rule(_ATTN + "k_proj.weight", "KH D"),
    Rule(_ATTN + "v_proj.weight", "KH D"),
    Rule(_ATTN + "o_proj.weight", "D NH"),
    Rule(_ATTN + "q_proj.bias", "NH", when=_biased),
    Rule(_ATTN + "k_proj.bias", "KH", when=_biased),
    Rule(_ATTN + "v_proj.bias", "KH", when=_biased),
    Rule(_ATTN + "o_proj.bias", "D", when=_biased),
    Rule(_ATTN + "q_norm.weight", "H", zero_centred=True),
    Rule(_ATTN + "k_norm.weight", "H", zero_centred=True),
    Rule(_LAYER + "post_attention_layernorm.weight", "D", zero_centred=True),
    Rule(_LAYER + "pre_feedforward_layernorm.weight", "D", zero_centred=True),
    Rule(_MLP + "gate_proj.weight", "F D"),
    Rule(_MLP + "up_proj.weight", "F D"),
    Rule(_MLP + "down_proj.weight", "D F"),
    Rule(_LAYER + "post_feedforward_layernorm.weight", "D", zero_centred=True),
    Rule("{text}.norm.weight", "D", on="last", zero_centred=True),
    Rule("lm_head.weight", "V D", on="head", tied_to="{text}.embed_tokens.weight"),
)
LEFT_OUT: tuple[re.Pattern[str], ...] = ()
