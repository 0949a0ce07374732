"""Digests of weights in the checkpoint's own layout, so that disk, JAX and torch can be held against each other.

A tensor's digest covers its dtype, shape and bytes; the root covers all of them by name. Equal roots mean equal
weights, wherever they live and however they are stacked or sharded there.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from loaders import dtypes
from loaders.memory import STAGING_BYTES

CHECKING_THREADS = 2  # of checksums of one array


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


def root_digest(digests: Mapping[str, str]) -> str:
    """SHA-256 (hex) over all tensor digests by name, in name order."""
    root = hashlib.sha256()
    for name in sorted(digests):
        root.update(f"{name}\0{digests[name]}\n".encode())
    return root.hexdigest()


def digests(tensors: Iterable[tuple[str, np.ndarray]]) -> dict[str, str]:
    """Digest of each (name, tensor), in name order."""
    return dict(sorted((name, tensor_digest(array)) for name, array in tensors))


def checksums(array: np.ndarray) -> list[int]:
    """CRC-32 of an array's bytes, piece by piece: does memory hold what it held?

    Takes three fifths of a digest's time, a third where two cores are free. Says nothing of dtype and shape.
    """
    held = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    pieces = [held[start : start + STAGING_BYTES] for start in range(0, held.nbytes, STAGING_BYTES)]
    if len(pieces) < 2:
        return [zlib.crc32(piece) for piece in pieces]
    with ThreadPoolExecutor(CHECKING_THREADS) as pool:  # no lock of Python's is held meanwhile
        return list(pool.map(zlib.crc32, pieces))
