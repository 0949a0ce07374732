"""What ModelOpt and compressed-tensors make of an array, in NumPy's terms: the references of the NVFP4 codec."""

from __future__ import annotations

import warnings
from functools import cache
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import torch

_INTEGER = {ml_dtypes.bfloat16: (np.int16, torch.bfloat16), ml_dtypes.float8_e4m3fn: (np.uint8, torch.float8_e4m3fn)}


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The same bits; always a copy, for the libraries write into what they are given."""
    integer, dtype = _INTEGER.get(array.dtype.type, (None, None))
    return torch.from_numpy(array.copy() if integer is None else array.view(integer).copy()).view(
        dtype or torch.from_numpy(array[:0].copy()).dtype
    )


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same bits."""
    for numpy_dtype, (integer, dtype) in _INTEGER.items():
        if tensor.dtype == dtype:
            return tensor.view(torch.from_numpy(np.zeros(1, integer)).dtype).numpy().view(numpy_dtype)
    return tensor.numpy()


@cache
def _libraries() -> SimpleNamespace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from compressed_tensors import quantization
        from compressed_tensors.compressors.nvfp4 import helpers
        from compressed_tensors.quantization import utils
        from compressed_tensors.quantization.lifecycle import forward
        from modelopt.torch.quantization.qtensor import nvfp4_tensor
    return SimpleNamespace(
        NVFP4QTensor=nvfp4_tensor.NVFP4QTensor,
        scheme=quantization.preset_name_to_scheme("NVFP4", ["Linear"]),
        FROZEN=quantization.QuantizationStatus.FROZEN,
        calculate_qparams=utils.calculate_qparams,
        generate_gparam=utils.generate_gparam,
        forward_quantize=forward.forward_quantize,
        dequantize=forward.dequantize,
        pack=helpers.quantize_and_pack_fp4,
        unpack=helpers.unpack_fp4_from_uint8,
    )


def modelopt(x: np.ndarray, amax: float | None = None, scale: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Packed codes, block scales and ``weight_scale_2`` of ``x``; of its own amax, another or a scale that is given."""
    library = _libraries().NVFP4QTensor
    if amax is not None:
        scale = (torch.tensor(amax, dtype=torch.float32) / (6.0 * 448.0)).numpy()
    given = None if scale is None else torch.from_numpy(np.asarray(scale, np.float32))
    packed, block, scale_2 = library.quantize(to_torch(x), 16, None, given)
    return packed._quantized_data.numpy(), to_numpy(block), scale_2.numpy()


def modelopt_dequantize(packed: np.ndarray, block: np.ndarray, scale: np.ndarray) -> np.ndarray:
    library = _libraries().NVFP4QTensor
    shape = (*packed.shape[:-1], packed.shape[-1] * 2)
    tensor = library(shape, torch.float32, torch.from_numpy(packed.copy()))
    scales = {"scale": to_torch(block), "double_scale": torch.from_numpy(np.asarray(scale, np.float32).copy())}
    return tensor.dequantize(torch.float32, block_sizes={-1: 16}, **scales).numpy()


def compressed_tensors(w: np.ndarray, amax: float | None = None) -> tuple[np.ndarray, ...]:
    """Packed codes, block scales and the divisor [1] of weights [N, K], by the calls of llm-compressor."""
    library, weight = _libraries(), to_torch(w)
    blocks = weight.unflatten(-1, (-1, 16))
    low, high = blocks.amin(-1), blocks.amax(-1)
    most = torch.maximum(-low.min(), high.max()) if amax is None else torch.tensor(amax).to(weight.dtype)
    divisor = library.generate_gparam(-most.reshape(1), most.reshape(1))
    block, _ = library.calculate_qparams(low, high, library.scheme.weights, divisor)
    packed = library.pack(weight, block.to(weight.dtype), divisor)
    return packed.numpy(), to_numpy(block.to(torch.float8_e4m3fn)), divisor.numpy()


def compressed_tensors_dequantize(packed: np.ndarray, block: np.ndarray, divisor: np.ndarray) -> np.ndarray:
    library, (M, half) = _libraries(), packed.shape
    values = library.unpack(torch.from_numpy(packed.copy()), M, half * 2, torch.float32)
    given = {"scale": to_torch(block).float(), "global_scale": torch.from_numpy(divisor.copy())}
    return library.dequantize(values, args=library.scheme.weights, dtype=torch.float32, **given).numpy()


def compressed_tensors_activations(x: np.ndarray, divisor: np.ndarray) -> np.ndarray:
    """What its quantised forward makes of activations, in their dtype; codes and block scales it keeps to itself."""
    library, given = _libraries(), torch.from_numpy(divisor.copy())
    module = torch.nn.Linear(1, 1)
    module.quantization_status, module.input_global_scale = library.FROZEN, given
    rounded = library.forward_quantize(module, to_torch(x), "input", library.scheme.input_activations)
    return to_numpy(rounded)
