"""The orders in which kernels want NVFP4 block scales and rows; only places change, never a bit.

A checkpoint holds none of them. Applying one twice is corruption, for none is its own inverse.

Source: weight loading of TensorRT-LLM and FlashInfer kernels for Blackwell (128x4 interleave of block scales; rows for
an epilogue tile of 128). Checked by their index formulas in tests/loaders/test_nvfp4_layout.py.
"""

from __future__ import annotations

import numpy as np

_TILE_ROWS, _TILE_COLUMNS = 128, 4
_GROUP = 32


def swizzle(scale: np.ndarray) -> np.ndarray:
    """Interleave block scales in tiles of 128 rows by 4 columns, zeros filled in.

    Element (m, k) goes to byte
    (m // 128) * (Kp / 4) * 512 + (k // 4) * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + k % 4.

    Args:
        scale: any dtype of one byte, [..., M, K/16].
    Returns:
        [..., Mp, Kp]: M and K/16 rounded up to 128 and 4. The shape is nominal: rows are no longer rows.
    """
    leading, (M, Kb) = scale.shape[:-2], scale.shape[-2:]
    Mp, Kp = padded(M, Kb)
    filled = np.zeros((*leading, Mp, Kp), scale.dtype)
    filled[..., :M, :Kb] = scale
    tiles = filled.reshape(*leading, Mp // 128, 4, 32, Kp // 4, 4)
    return np.moveaxis(tiles, (-2, -3, -4), (-4, -3, -2)).reshape(filled.shape)


def unswizzle(swizzled: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of ``swizzle``; ``shape`` is [..., M, K/16] without what was filled in.

    Raises:
        ValueError: ``swizzled`` is not what ``swizzle`` makes of ``shape``.
    """
    Mp, Kp = padded(*shape[-2:])
    if swizzled.shape != (*shape[:-2], Mp, Kp):
        raise ValueError(f"swizzled scales have shape {swizzled.shape}, expected {(*shape[:-2], Mp, Kp)} for {shape}")
    tiles = swizzled.reshape(*shape[:-2], Mp // 128, Kp // 4, 32, 4, 4)
    rows = np.moveaxis(tiles, (-4, -3, -2), (-2, -3, -4)).reshape(swizzled.shape)
    return np.ascontiguousarray(rows[..., : shape[-2], : shape[-1]])


def padded(num_rows: int, num_columns: int) -> tuple[int, int]:
    """Rows and columns of the swizzled form."""
    return -(-num_rows // _TILE_ROWS) * _TILE_ROWS, -(-num_columns // _TILE_COLUMNS) * _TILE_COLUMNS


def shuffle_rows(rows: np.ndarray) -> np.ndarray:
    """Rows in the order of an epilogue tile of 128: out[r] = in[32 * (r // 32) + 4 * (r % 8) + r % 32 // 8].

    Args:
        rows: [..., M, C], packed weights or (before ``swizzle``) their block scales.
    Raises:
        ValueError: M is no multiple of 128.
    """
    return rows[..., shuffled_order(rows.shape[-2]), :]


def unshuffle_rows(rows: np.ndarray) -> np.ndarray:
    """Inverse of ``shuffle_rows``."""
    return rows[..., np.argsort(shuffled_order(rows.shape[-2])), :]


def shuffle_gated_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of a first half and a second half by turns, then as ``shuffle_rows``: for a stack [up; gate], [..., M, C].

    Raises:
        ValueError: M is no multiple of 128.
    """
    return rows[..., gated_order(rows.shape[-2]), :]


def unshuffle_gated_rows(rows: np.ndarray) -> np.ndarray:
    """Inverse of ``shuffle_gated_rows``."""
    return rows[..., np.argsort(gated_order(rows.shape[-2])), :]


def shuffled_order(num_rows: int) -> np.ndarray:
    """Where each row of ``shuffle_rows`` comes from, int64 [M].

    Raises:
        ValueError: ``num_rows`` is no multiple of 128.
    """
    if num_rows % _TILE_ROWS:
        raise ValueError(
            f"{num_rows} rows cannot be shuffled, expected a multiple of {_TILE_ROWS}. Fill up with zeros."
        )
    order = np.arange(num_rows)
    place = order % _GROUP
    return order - place + 4 * (place % 8) + place // 8


def gated_order(num_rows: int) -> np.ndarray:
    """Where each row of ``shuffle_gated_rows`` comes from, int64 [M].

    Raises:
        ValueError: ``num_rows`` is no multiple of 128.
    """
    by_turns = np.arange(num_rows).reshape(2, -1).T.reshape(-1) if num_rows % 2 == 0 else np.arange(num_rows)
    return by_turns[shuffled_order(num_rows)]
