"""Qwen3-VL, dense and mixture of experts: the text model of Qwen3 inside the multimodal wrapper, as published.

Source: transformers ``Qwen3VLConfig``, ``Qwen3VLMoeConfig`` and the models' saved names (5.23).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from loaders import qwen3
from loaders.config import PARTIAL_KEYS, refused_keys, with_rope_defaults
from loaders.errors import brief
from loaders.expert_rules import expert_rules
from loaders.qwen3 import FULL, Qwen3Config, Qwen3MoeConfig, read_text
from loaders.spec import Dim, Rule
from loaders.vision import WRAPPER_KEYS, VisionConfig, read_vision, vision_rules

DEFAULT_SECTION, DEFAULT_LEVELS = [24, 20, 20], [8, 16, 24]
DEFAULT_IMAGE, DEFAULT_VIDEO = 151655, 151656


@dataclass(frozen=True, kw_only=True)
class Qwen3VLConfig(Qwen3Config):
    """config.json of Qwen3VLForConditionalGeneration: its text_config, and its vision tower."""

    vision: VisionConfig | None

    absent_kv_heads = 32
    text_paths = ("model.language_model",)
    is_multi_axis = True

    def dims(self) -> dict[str, Dim]:
        return super().dims() | _vision_dims(self.vision)

    def problems(self) -> list[str]:
        return super().problems() + _wrapper_problems(self)


@dataclass(frozen=True, kw_only=True)
class Qwen3VLMoeConfig(Qwen3MoeConfig):
    """config.json of Qwen3VLMoeForConditionalGeneration."""

    vision: VisionConfig | None

    absent_kv_heads = 16
    text_paths = ("model.language_model",)
    is_multi_axis = True

    def dims(self) -> dict[str, Dim]:
        more = {"2M": Dim(2 * self.moe_intermediate_size, "moe_intermediate_size")}
        return super().dims() | more | _vision_dims(self.vision)

    def problems(self) -> list[str]:
        return super().problems() + _wrapper_problems(self)


def _vision_dims(vision: VisionConfig | None) -> dict[str, Dim]:
    return {} if vision is None else vision.dims()


def _wrapper_problems(config: Qwen3VLConfig | Qwen3VLMoeConfig) -> list[str]:
    section = config.rope_parameters.mrope_section or ()
    found = []
    if len(section) != 3 or min(section, default=0) < 0:
        found.append(f"config.json: mrope_section is {list(section)}, expected three numbers of pairs")
    if not config.rope_parameters.mrope_interleaved:
        found.append("config.json: rope option 'mrope_interleaved' = False is not implemented, expected True")
    if config.rope_parameters.partial_rotary_factor != 1:
        found.append("config.json: rope option 'partial_rotary_factor' is not implemented for Qwen3-VL")
    if config.rope_parameters.is_dynamic:
        found.append("config.json: rope_type 'dynamic' is not implemented for Qwen3-VL")
    if config.vision is not None:
        found += config.vision.problems(config.hidden_size)
    return found


def config_from_json(architecture: str, document: dict[str, Any]) -> tuple[Any, list[str]]:
    """Read config.json of either architecture; None and every problem when it cannot be."""
    text = document.get("text_config")
    if not isinstance(text, dict):
        return None, [f"config.json: text_config is {brief(text)}, expected an object"]
    tokens = {"image_token_id": DEFAULT_IMAGE, "video_token_id": DEFAULT_VIDEO}
    vision, problems = read_vision(document, levels=DEFAULT_LEVELS, **tokens)
    if vision is None and not problems:
        problems.append("config.json: vision_config is missing. A text model alone is Qwen3ForCausalLM.")
    problems += refused_keys(document, set(WRAPPER_KEYS) | {"eos_token_id", "pad_token_id"})
    outer = {key: document[key] for key in ("eos_token_id", "pad_token_id") if document.get(key) is not None}
    # the whole model is tied or not; what the text model says of itself is not read
    tied = document.get("tie_word_embeddings")
    text = {**text, **outer, "tie_word_embeddings": False if tied is None else tied}
    text = with_rope_defaults(text, {"mrope_section": DEFAULT_SECTION, "mrope_interleaved": True})
    kinds = text.pop("layer_types", None)
    if isinstance(kinds, list) and set(map(str, kinds)) - {FULL}:
        problems.append(f"config.json: layer_types {brief(kinds)} is not implemented, expected only {FULL}")
        kinds = None
    # whatever a file says of a window, these models never slide
    text |= {"vision": vision, "layer_types": kinds, "use_sliding_window": False, "max_window_layers": 0}
    is_moe = "Moe" in architecture
    if is_moe:
        if text.setdefault("norm_topk_prob", True) is not True:
            problems.append("config.json: norm_topk_prob false is not implemented: Qwen3-VL always norms. Remove it.")
        text.setdefault("decoder_sparse_step", 1)
    config, more = read_text(Qwen3VLMoeConfig if is_moe else Qwen3VLConfig, architecture, text, PARTIAL_KEYS)
    return (None if problems + more else config), problems + more


RULES: tuple[Rule, ...] = (
    # of Qwen3's table all but the experts, which are published fused, inputs first
    *(rule for rule in qwen3.RULES if ".experts." not in rule.tensor),
    *expert_rules("{text}.layers.{layer}.mlp.experts.", prefers_transposed=True, when=qwen3.is_sparse),
    *vision_rules(),
)
LEFT_OUT: tuple[re.Pattern[str], ...] = (re.compile(r"(model\.)?visual\..*"),)  # unless the tower is wanted
