"""Derived tensors: what layers compute from their weights and keep. Allocated once, written in place (laws 4 and 5).

A layer that keeps any declares them as buffers and has ``derive()``, which computes all of them anew from the weights
it was loaded with. Loaders write weights only.
"""

from __future__ import annotations

import torch
from torch import nn


def allocate_derived(module: nn.Module, device: torch.device) -> None:
    """Give every derived tensor its storage, for life, and its first value."""
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, torch.empty_like(buffer, device=device))
    derive(module)


def derive(module: nn.Module) -> None:
    """Compute everything derived anew; after any change of weights."""
    for part in module.modules():
        if callable(compute := getattr(part, "derive", None)):
            compute()
