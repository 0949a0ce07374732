"""The bytes of tensors: NumPy views of their memory, and whether two hold the same bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from loaders.dtypes import from_numpy, to_numpy

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def host_view(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as NumPy sees it, bfloat16 included; writing to one writes to both."""
    flat = tensor.detach().view(-1).view(torch.uint8).numpy()
    return flat.view(to_numpy(NAMES[tensor.dtype])).reshape(tensor.shape)


def of_host(array: np.ndarray) -> torch.Tensor:
    """A tensor on the CPU with the bits of an array, bfloat16 included; the memory is copied."""
    return over_host(np.array(array, order="C"))


def over_host(array: np.ndarray) -> torch.Tensor:
    """A tensor on the CPU in the very memory of a C-contiguous array, bfloat16 included; its storage has one size."""
    flat = torch.from_numpy(array.reshape(-1).view(np.uint8))
    return flat.view(DTYPES[from_numpy(array.dtype)]).view(array.shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bits (NaN equals itself, -0 is not 0)."""
    return torch.equal(
        a.detach().contiguous().view(-1).view(torch.uint8), b.detach().contiguous().view(-1).view(torch.uint8)
    )


def is_freed(tensor: torch.Tensor) -> bool:
    """Whether its storage was given back, as that of a model that sleeps; reading it may end the process."""
    return not tensor.data_ptr() and bool(tensor.numel()) and not tensor.untyped_storage().nbytes()


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """Every parameter once. ``Module.parameters`` in a fifth of the time, for what is asked at every step."""
    found: dict[int, nn.Parameter] = {}
    modules, seen = [module], {id(module)}
    for part in modules:
        for param in part._parameters.values():
            if param is not None:
                found[id(param)] = param
        for child in part._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                modules.append(child)
    return list(found.values())
