"""Qwen3, Qwen3.5, Qwen3-VL and Gemma 3 in PyTorch: modules whose weights change in place."""

from torch_models.census import pointer_census
from torch_models.derived import alias_or_bind_derived_param, copy_or_rebind_param
from torch_models.load import load
from torch_models.model import Model

__all__ = ["Model", "alias_or_bind_derived_param", "copy_or_rebind_param", "load", "pointer_census"]
