"""Qwen3, dense and mixture of experts: config.json and the checkpoint's tensors, as published on Hugging Face.

Source: transformers ``Qwen3Config``, ``Qwen3MoeConfig`` and the models' saved names (5.23).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
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
from loaders.config import UNREAD_ROPE, RopeParameters, read_config, read_rope
from loaders.errors import brief
from loaders.quantization.schemes import Quantization
from loaders.spec import Dim, Rule

FULL, SLIDING = "full_attention", "sliding_attention"
ABSENT_WINDOW = 4096  # transformers' where layers slide and no window is named


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """config.json of Qwen3ForCausalLM. Letters: docs/glossary.md."""

    architecture: str
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F, dense layers
    num_hidden_layers: int  # L
    num_attention_heads: int  # N
    num_key_value_heads: int  # K
    head_dim: int  # H
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: RopeParameters
    layer_types: tuple[str, ...]
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    sliding_window: int | None = None  # keys a query sees, itself included, in layers of that type; None without any
    use_sliding_window: bool = field(default=False, compare=False)  # of layer_types, which say it layer by layer
    # how generation ends is not what the model computes: two configs that differ here are equal
    eos_token_id: tuple[int, ...] = field(default=(), compare=False)
    pad_token_id: int | None = field(default=None, compare=False)
    quantization: Quantization | None = None  # of the whole checkpoint, not a key of this document

    absent_kv_heads = 32  # what transformers takes a file for that does not name them; null: as many as of queries
    text_paths = ("model",)
    num_mtp_layers = 0
    is_multi_axis = False
    is_recurrent = False
    vision = None

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that turn: all."""
        return self.head_dim

    def is_sparse(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` routes to experts."""
        return False

    @property
    def needs_whole_rows(self) -> bool:
        """A window counts masked tokens."""
        return SLIDING in self.layer_types

    def rope(self, layer: int) -> RopeParameters:
        """Rotary embedding of ``layer``: one for all."""
        return self.rope_parameters

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
        if self.rope_parameters.is_dynamic and self.head_dim <= 2:
            found.append(f"config.json: head_dim={self.head_dim} is too small for rope_type 'dynamic', expected >= 4")
        found += only_problems("hidden_act", self.hidden_act, "silu") + positive_problems(
            rms_norm_eps=self.rms_norm_eps
        )
        found += layer_type_problems(self, FULL, SLIDING)
        if SLIDING in self.layer_types and self.sliding_window is None:
            found.append("config.json: layer_types asks for sliding_attention, but no sliding_window is in force")
        return found


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(Qwen3Config):
    """config.json of Qwen3MoeForCausalLM."""

    num_experts: int  # E
    num_experts_per_tok: int  # X
    moe_intermediate_size: int  # M
    norm_topk_prob: bool
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...] = ()

    absent_kv_heads = 4

    def is_sparse(self, layer: int) -> bool:
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    def dims(self) -> dict[str, Dim]:
        return {
            **super().dims(),
            "E": Dim(self.num_experts, "num_experts"),
            "M": Dim(self.moe_intermediate_size, "moe_intermediate_size"),
        }

    def problems(self) -> list[str]:
        return super().problems() + expert_problems(self)


def config_from_json(architecture: str, document: dict[str, Any]) -> tuple[Qwen3Config | None, list[str]]:
    """Read config.json of either architecture; None and every problem when it cannot be."""
    return read_text(Qwen3MoeConfig if architecture == "Qwen3MoeForCausalLM" else Qwen3Config, architecture, document)


def read_text(
    kind: type[Qwen3Config], architecture: str, document: dict[str, Any], rope_keys: frozenset[str] = frozenset()
) -> tuple[Any, list[str]]:
    """Read a text model's keys into ``kind``, also those of a wrapped one; None and every problem.

    ``rope_keys``: of ``PARTIAL_KEYS``, those that the family implements.
    """
    is_moe = issubclass(kind, Qwen3MoeConfig)
    rope, problems = read_rope(document, rope_keys)
    spelled = {key: value for key, value in document.items() if key not in ("rope_theta", "rope_scaling")}
    spelled["architecture"] = architecture
    spelled["rope_parameters"] = UNREAD_ROPE if rope is None else rope
    if isinstance(document.get("eos_token_id"), int):
        spelled["eos_token_id"] = [document["eos_token_id"]]
    if document.get("num_key_value_heads") is None:
        heads = _or(1, document.get("num_attention_heads"))
        spelled["num_key_value_heads"] = heads if "num_key_value_heads" in document else kind.absent_kv_heads
    if document.get("head_dim") is None:
        # what absence means differs: Qwen3Config has a field with 128, Qwen3MoeConfig has none and its model divides
        spelled["head_dim"] = _or(4, _divided(document, "hidden_size", "num_attention_heads")) if is_moe else 128
    if not document.get("use_sliding_window"):
        spelled["sliding_window"] = None
    spelled.setdefault("sliding_window", ABSENT_WINDOW)
    if is_moe and "num_local_experts" in document:  # how transformers 5 spells it
        local = spelled.pop("num_local_experts")
        if spelled.setdefault("num_experts", local) != local:
            both = f"num_experts={brief(document['num_experts'])} and num_local_experts={brief(local)}"
            problems.append(f"config.json: {both} disagree")
    first = 0 if is_moe else document.get("max_window_layers", 28)  # the sparse model slides every layer
    if type(first) is not int:
        problems.append(f"config.json: max_window_layers is {brief(first)}, expected an integer")
        first = 0
    derived = _layer_types(spelled, first)
    given = spelled.get("layer_types")
    spelled["layer_types"] = derived if given is None else given
    if is_moe and given not in (None, derived):  # the sparse model never reads the key
        expected = f"{brief(given)} is not implemented for {architecture}, expected {brief(derived)}"
        problems.append(f"config.json: layer_types {expected}")
    config, more = read_config(kind, spelled)
    problems += more
    if config is not None and SLIDING not in config.layer_types:
        config = replace(config, sliding_window=None)
    return (None if problems else config), problems


def _layer_types(document: dict[str, Any], first: int) -> list[str]:
    """What a config.json without layer_types means: layers from ``first`` on slide, if any do."""
    layers = document.get("num_hidden_layers")
    if not isinstance(layers, int) or layers > MOST_LAYERS:
        return []  # reported as missing or as too many
    is_sliding = document.get("sliding_window") is not None
    return [SLIDING if is_sliding and layer >= first else FULL for layer in range(layers)]


def _or(harmless: int, derived: Any) -> Any:
    """What a key derived from missing ones is read as, so that only those are reported."""
    return harmless if derived is None else derived


def _divided(document: dict[str, Any], size: str, parts: str) -> int | None:
    a, b = document.get(size), document.get(parts)
    return a // b if isinstance(a, int) and isinstance(b, int) and b > 0 else None


def _biased(config: Qwen3Config, layer: int) -> bool:
    return config.attention_bias


def _dense(config: Qwen3Config, layer: int) -> bool:
    return not config.is_sparse(layer)


def is_sparse(config: Qwen3Config, layer: int) -> bool:
    """Whether a layer has experts, for rules."""
    return config.is_sparse(layer)


_LAYER = "{text}.layers.{layer}."
_ATTN = _LAYER + "self_attn."
_MLP = _LAYER + "mlp."
_GATE_UP = _MLP + "experts.gate_up_proj"

# Parameters keep the checkpoint's names; only the experts are stacked.
RULES: tuple[Rule, ...] = (
    Rule("{text}.embed_tokens.weight", "V D", on="embedding"),
    Rule(_LAYER + "input_layernorm.weight", "D"),
    Rule(_ATTN + "q_proj.weight", "NH D"),
    Rule(_ATTN + "k_proj.weight", "KH D"),
    Rule(_ATTN + "v_proj.weight", "KH D"),
    Rule(_ATTN + "o_proj.weight", "D NH"),
    Rule(_ATTN + "q_proj.bias", "NH", when=_biased),
    Rule(_ATTN + "k_proj.bias", "KH", when=_biased),
    Rule(_ATTN + "v_proj.bias", "KH", when=_biased),
    Rule(_ATTN + "o_proj.bias", "D", when=_biased),
    Rule(_ATTN + "q_norm.weight", "H"),
    Rule(_ATTN + "k_norm.weight", "H"),
    Rule(_LAYER + "post_attention_layernorm.weight", "D"),
    Rule(_MLP + "gate_proj.weight", "F D", when=_dense),
    Rule(_MLP + "up_proj.weight", "F D", when=_dense),
    Rule(_MLP + "down_proj.weight", "D F", when=_dense),
    Rule(_MLP + "gate.weight", "E D", when=is_sparse, is_router=True),
    Rule(_MLP + "experts.{expert}.gate_proj.weight", "M D", into=_GATE_UP, shard_id=0, when=is_sparse),
    Rule(_MLP + "experts.{expert}.up_proj.weight", "M D", into=_GATE_UP, shard_id=1, when=is_sparse),
    Rule(_MLP + "experts.{expert}.down_proj.weight", "D M", into=_MLP + "experts.down_proj", when=is_sparse),
    Rule("{text}.norm.weight", "D", on="last"),
    Rule("lm_head.weight", "V D", on="head", tied_to="{text}.embed_tokens.weight"),
)
LEFT_OUT: tuple[re.Pattern[str], ...] = ()
