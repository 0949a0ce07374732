"""Tiny models that show a bug: real Hugging Face checkpoints, made from (name, seed) alone, without transformers.

Random weights as libraries initialise them hide most bugs (norms of one, zero biases, logits near zero). Here every
branch moves the residual stream by its own size, no two norms are alike, logits spread over about 3, and no two sizes
agree by accident. What that means in numbers is checked in tests/parity/test_zoo.py.
"""

from parity.zoo.checkpoints import canaries, make_checkpoint, prompts
from parity.zoo.models import ZOO, Form, Spelling, ZooModel, zoo_config
from parity.zoo.quantized import ZooQuantization, block_sizes
from parity.zoo.weights import HUGE_TOKEN, TINY_TOKEN, TWIN_TOKENS

__all__ = [
    "HUGE_TOKEN",
    "TINY_TOKEN",
    "TWIN_TOKENS",
    "ZOO",
    "Form",
    "Spelling",
    "ZooModel",
    "ZooQuantization",
    "block_sizes",
    "canaries",
    "make_checkpoint",
    "prompts",
    "zoo_config",
]
