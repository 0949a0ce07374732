"""NVFP4 codes times NVFP4 codes, on devices whose tensor cores multiply them: compute capability 10.0 and later.

Both operands are packed codes [M, K/2] with e4m3 block scales in the 128x4 order that those tensor cores read; the
product itself is torch's scaled matmul (cuBLASLt).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

MIN_CAPABILITY = (10, 0)
TILE_ROWS, TILE_COLUMNS = 128, 4
ROWS_MULTIPLE, BYTES_MULTIPLE = 16, 16  # of N and of K/2, as torch's scaled matmul asks


def is_available(device: torch.device) -> bool:
    """Whether the device multiplies FP4, and this torch has the dtype for it."""
    if device.type != "cuda" or torch.version.hip or not hasattr(torch, "float4_e2m1fn_x2"):
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def swizzled(scale: torch.Tensor) -> torch.Tensor:
    """Block scales in the 128x4 order, padded with zeros to whole tiles of 128 rows and 4 columns.

    Scale (m, q) of padded [M, Q] goes to byte ``(m // 128 * (Q / 4) + q // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 +
    q % 4``. Not an involution: a second time is another order, and ``unswizzled`` the way back.

    Args:
        scale: one-byte dtype [..., M, Q].
    Returns:
        The same dtype [..., M to 128, Q to 4], contiguous; rows and columns are no longer those of the weight.
    Source: PTX ISA, ``tcgen05.mma`` block scaling, scale factor layout; by hand in
        tests/torch_models/test_nvfp4_blackwell.py.
    """
    rows, columns = scale.shape[-2:]
    # as bytes: not every operation has a kernel for float8
    padded = F.pad(scale.view(torch.uint8), (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS))
    tiles = padded.unflatten(-1, (-1, TILE_COLUMNS)).unflatten(-3, (-1, 4, 32))  # [..., tile, 4, 32, tile, 4]
    return tiles.movedim((-5, -2, -3, -4), (-5, -4, -3, -2)).reshape(padded.shape).view(scale.dtype)


def unswizzled(swizzled: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Block scales by row and column again; inverse of ``swizzled``.

    Args:
        swizzled: one-byte dtype [..., M to 128, Q to 4].
        shape: [..., M, Q] of the scales that were swizzled.
    Returns:
        The same dtype, of ``shape``, contiguous.
    """
    *stack, rows, columns = swizzled.shape
    tiles = swizzled.view(torch.uint8).reshape(*stack, rows // TILE_ROWS, columns // TILE_COLUMNS, 32, 4, TILE_COLUMNS)
    padded = tiles.movedim((-5, -4, -3, -2), (-5, -2, -3, -4)).reshape(swizzled.shape)
    return padded[..., : shape[-2], : shape[-1]].contiguous().view(swizzled.dtype)


def matmul(
    codes_UJ: torch.Tensor,
    act_scale_swizzled: torch.Tensor,
    packed_NJ: torch.Tensor,
    weight_scale_interleaved: torch.Tensor,
    alpha: torch.Tensor,
) -> torch.Tensor:
    """alpha (x Wᵀ) of codes by codes, summed in float32.

    The product wants N in multiples of 16 and K in multiples of 32. Other weights are padded with zeros here, a copy at
    every call, and the result is cut; swizzled scales are padded further than that already.

    Args:
        codes_UJ: uint8 [U, K/2], packed as weights are.
        act_scale_swizzled: e4m3 [U to 128, K/16 to 4], by ``swizzled``.
        packed_NJ: uint8 [N, K/2].
        weight_scale_interleaved: e4m3 [N to 128, K/16 to 4], by ``swizzled``.
        alpha: float32 [] or [N]; holds both global scales.
    Returns:
        float32 [U, N].
    """
    num_rows, depth = packed_NJ.shape
    codes, packed = _padded(codes_UJ, 1, BYTES_MULTIPLE), _padded(packed_NJ, ROWS_MULTIPLE, BYTES_MULTIPLE)
    for scale, rows in ((act_scale_swizzled, len(codes)), (weight_scale_interleaved, num_rows)):
        expected = (rows + -rows % TILE_ROWS, depth // 8 + -(depth // 8) % TILE_COLUMNS)
        assert scale.shape == expected, f"{scale.shape=} {expected=}"
    operands = (codes.view(torch.float4_e2m1fn_x2), packed.view(torch.float4_e2m1fn_x2).T)
    out_UN = _scaled_mm(*operands, act_scale_swizzled, weight_scale_interleaved)[:, :num_rows]
    return out_UN * alpha


def _padded(codes: torch.Tensor, rows_multiple: int, bytes_multiple: int) -> torch.Tensor:
    rows, bytes_ = -codes.shape[0] % rows_multiple, -codes.shape[1] % bytes_multiple
    return F.pad(codes, (0, bytes_, 0, rows)) if rows or bytes_ else codes.contiguous()


def _scaled_mm(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor) -> torch.Tensor:
    scaled_mm: Any = getattr(F, "scaled_mm", None)
    if scaled_mm is None:  # the older name tells recipe and order from dtypes
        return torch._scaled_mm(a, b, scale_a.flatten(), scale_b.flatten(), out_dtype=torch.float32)
    recipe, order = F.ScalingType.BlockWise1x16, F.SwizzleType.SWIZZLE_32_4_4
    return scaled_mm(
        a,
        b,
        scale_a.flatten(),
        recipe,
        scale_b.flatten(),
        recipe,
        swizzle_a=order,
        swizzle_b=order,
        output_dtype=torch.float32,
    )
