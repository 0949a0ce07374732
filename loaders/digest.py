"""Digests of weights in the checkpoint's own layout, so that disk, JAX and torch can be held against each other.

A tensor's digest covers its dtype, shape and bytes; the root covers all of them by name. Equal roots mean equal
weights, wherever they live and however they are stacked or sharded there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from loaders import dtypes


def tensor_digest(array: np.ndarray, *, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> str:
    """SHA-256 (hex) of one tensor.

    Args:
        array: the tensor as NumPy holds it; packed formats as their bytes.
        dtype: safetensors name when NumPy has no dtype for it; default: the array's.
        shape: logical shape when it differs from the array's.
    """
    sizes = [int(size) for size in (array.shape if shape is None else shape)]
    header = f"{dtype or dtypes.from_numpy(array.dtype)}{sizes}"
    digest = hashlib.sha256(header.encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def short_digest(*arrays: np.ndarray) -> str:
    """Arrays of any dtypes in few words: 16 hex digits of the SHA-256 of their dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype} {array.shape} ".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]


def digest_after(content: str, *arrays: np.ndarray) -> str:
    """What was described as ``content``, and then these arrays, likewise."""
    return short_digest(np.frombuffer(content.encode(), np.uint8), *arrays)


def root_digest(digests: Mapping[str, str]) -> str:
    """SHA-256 (hex) over all tensor digests by name, in name order."""
    root = hashlib.sha256()
    for name in sorted(digests):
        root.update(f"{name}\0{digests[name]}\n".encode())
    return root.hexdigest()


def digests(tensors: Iterable[tuple[str, np.ndarray]]) -> dict[str, str]:
    """Digest of each (name, tensor), in name order."""
    return dict(sorted((name, tensor_digest(array)) for name, array in tensors))
