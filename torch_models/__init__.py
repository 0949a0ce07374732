"""Qwen3 in PyTorch: modules whose weights change in place."""

from torch_models.census import pointer_census
from torch_models.load import load
from torch_models.model import Model

__all__ = ["Model", "load", "pointer_census"]
