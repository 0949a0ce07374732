"""Qwen3, Qwen3.5, Qwen3-VL and Gemma 3 in Flax NNX: pure functions over weight pytrees."""

from jax_models.load import load
from jax_models.model import Model
from jax_models.saving import restore

__all__ = ["Model", "load", "restore"]
