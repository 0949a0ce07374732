"""Dtypes of safetensors by their names in the file, with their NumPy counterparts.

Source: the ``Dtype`` enum of the safetensors format (0.8). Formats NumPy lacks come from ml_dtypes, which jax uses too.
A name that is not in this table is an error wherever it appears; nothing falls back to another dtype. F6_E2M3 and
F6_E3M2, which its library names, writes nowhere and reads nowhere, are not.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

_WHOLE_BYTE: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_PACKED_BITS = {"F4": 4}

NAMES = frozenset(_WHOLE_BYTE) | frozenset(_PACKED_BITS)
_BY_NUMPY = {numpy_dtype: name for name, numpy_dtype in _WHOLE_BYTE.items()}


def bits(name: str) -> int:
    """Bits of one element of the safetensors dtype ``name``."""
    return _PACKED_BITS[name] if name in _PACKED_BITS else _WHOLE_BYTE[name].itemsize * 8


def to_numpy(name: str) -> np.dtype:
    """NumPy dtype of a safetensors dtype; packed sub-byte formats read as their bytes (uint8)."""
    return np.dtype(np.uint8) if name in _PACKED_BITS else _WHOLE_BYTE[name]


def from_numpy(dtype: np.dtype) -> str:
    """Safetensors name of a NumPy dtype.

    Raises:
        ValueError: safetensors has no such dtype.
    """
    name = _BY_NUMPY.get(np.dtype(dtype))
    if name is None:
        raise ValueError(f"safetensors has no name for dtype {dtype}. It has {', '.join(sorted(_WHOLE_BYTE))}.")
    return name


def stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the array ``to_numpy(name)`` that holds ``shape`` elements: packed formats shrink the last axis."""
    if name not in _PACKED_BITS or not shape:
        return shape
    return (*shape[:-1], shape[-1] * _PACKED_BITS[name] // 8)
