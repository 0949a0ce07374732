"""A config.json that is broken in several ways at once: all of them are told together."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from loaders.config import config_from_json
from parity.zoo import zoo_config

GONE = object()
BREAKAGES: dict[str, list[Any]] = {
    "hidden_size": [GONE, -5, "x", 2**40],
    "vocab_size": [GONE, 0, None, 1.5],
    "num_hidden_layers": [0, 10**6, "x"],
    "layer_types": [["a"], "x"],
    "head_dim": [0, -3, "x"],
    "intermediate_size": [0, []],
    "rms_norm_eps": [GONE, 0, "x"],
    "eos_token_id": [2**40, "x"],
    "mystery": [1],
    "rope_parameters": [3, {"rope_type": "foo"}],
    "num_experts_per_tok": [0, 10**6, "x"],
    "moe_intermediate_size": [[1], 0],
    "linear_conv_kernel_dim": [0, "x"],
    "linear_num_key_heads": [0, 4, "x"],
    "query_pre_attn_scalar": [0, "x"],
    "mtp_num_hidden_layers": [-1, "x"],
}


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe", "qwen3_5", "qwen3_5-moe", "qwen3_vl", "gemma3"])
def test_no_problem_hides_another_one(name: str) -> None:
    """Each is told of whatever else is wrong, and nothing is that is not."""
    plain = zoo_config(name)
    text_of = plain.get("text_config", plain)

    def told(changes: dict[str, Any]) -> list[str]:
        text = {key: value for key, value in (text_of | changes).items() if value is not GONE}
        return config_from_json(plain | {"text_config": text} if "text_config" in plain else text)[1]

    def named(key: str, problems: list[str]) -> bool:
        return any(re.search(rf"\b{key.removeprefix('rope_parameters') or 'rope_'}", problem) for problem in problems)

    alone = {key: [value for value in values if named(key, told({key: value}))] for key, values in BREAKAGES.items()}
    assert sum(map(bool, alone.values())) >= 9
    dice = random.Random(name)
    for _ in range(200):
        keys = dice.sample([key for key, values in alone.items() if values], dice.randint(2, 5))
        changes = {key: dice.choice(alone[key]) for key in keys}
        problems = told(changes)
        assert [key for key in keys if not named(key, problems)] == [], changes
        innocent = text_of.keys() - keys - {"num_experts", "linear_num_value_heads"}
        blamed = {key for key in innocent if any(re.match(rf"config.json: {key}\b", one) for one in problems)}
        assert blamed <= {"rope_theta"}, (changes, problems)
