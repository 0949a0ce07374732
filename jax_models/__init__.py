"""Qwen3 in Flax NNX: pure functions over weight pytrees."""

from jax_models.load import load
from jax_models.model import Model

__all__ = ["Model", "load"]
