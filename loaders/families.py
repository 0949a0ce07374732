"""Which module implements an architecture. The same name in loaders, jax_models and torch_models.

A family module declares everything shared code reads (``config_from_json``, ``RULES``, ``LEFT_OUT``), so no shared code
ever asks for a model's name. Adding a family adds its architectures here and to the zoo.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from typing import Any, Protocol

from loaders.spec import ModelConfig, Rule

FAMILIES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3",
    "Qwen3_5ForCausalLM": "qwen3_5",
    "Qwen3_5MoeForCausalLM": "qwen3_5",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl",
    "Gemma3ForCausalLM": "gemma3",
}


class Family(Protocol):
    """What ``loaders/<family>.py`` offers."""

    RULES: Sequence[Rule]
    LEFT_OUT: Sequence[re.Pattern[str]]  # tensors the model deliberately does not load; counted and reported

    def config_from_json(self, architecture: str, document: dict[str, Any]) -> tuple[ModelConfig | None, list[str]]: ...


def publishes_transposed(model_type: str) -> bool | None:
    """Whether a family is published with fused experts, inputs first; None: not with fused ones.

    Args:
        model_type: of config.json, or of its text_config.
    Raises:
        ValueError: no family has it.
    """
    plain = model_type.removesuffix("_text").replace("_", "")
    known = [one for one in FAMILIES if one.lower().replace("_", "").startswith(f"{plain}for")]
    if not known:
        raise ValueError(f"model_type is {model_type!r}, expected that of {', '.join(FAMILIES)}")
    forms = (rule.form for rule in family_module(known[0]).RULES if rule.is_fused)
    return next((form == "fused transposed" for form in forms), None)


def family_module(architecture: str) -> Family:
    return importlib.import_module(f"loaders.{FAMILIES[architecture]}")  # pyright: ignore[reportReturnType]
