"""Where tensors live: NumPy views of their memory, and the census that proves nothing moved."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from loaders.dtypes import to_numpy

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def host_view(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as NumPy sees it, bfloat16 included; writing to one writes to both."""
    flat = tensor.detach().view(-1).view(torch.uint8).numpy()
    return flat.view(to_numpy(NAMES[tensor.dtype])).reshape(tensor.shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bits (NaN equals itself, -0 is not 0)."""
    return torch.equal(
        a.detach().contiguous().view(-1).view(torch.uint8), b.detach().contiguous().view(-1).view(torch.uint8)
    )


@dataclass(frozen=True, slots=True)
class Address:
    """What a captured graph remembers of a tensor."""

    data_ptr: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def pointer_census(module: nn.Module) -> dict[str, Address]:
    """Address of every parameter and buffer by name; one that has two names appears under both."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: Address(t.data_ptr(), tuple(t.shape), tuple(t.stride()), t.dtype, t.device) for name, t in tensors}


def moved(before: dict[str, Address], after: dict[str, Address]) -> list[str]:
    """Names whose address differs between two censuses, vanished and new ones included."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
