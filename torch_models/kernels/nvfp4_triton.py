"""NVFP4 weights times bfloat16 or float32 activations, in Triton; the signatures of ``nvfp4_reference``.

Weights are read as they are stored and expanded in registers: e2m1 times e4m3 is exact in bfloat16, so products are the
reference's and only the order of float32 sums differs. That order depends on shapes alone; there are no atomics, so the
same call gives the same bits. Nothing asks the host, and memory is allocated by shape: all of it can be captured.

One row is a matrix-vector product, summed without tensor cores: it is the reading of weights that takes time, and every
byte is read once. Several rows are tiles of ``tl.dot``, with the weight as the left operand, which then may have as few
as 16 rows of x on its right; where that is too few tiles for a device, K is split, and a second kernel adds the parts.
"""

# Kernels are not Python: their arguments have no types to write, and `tl` is there whenever one runs.
# ruff: noqa: ANN001, ANN202
# pyright: reportOptionalMemberAccess=false, reportInvalidTypeForm=false, reportMissingImports=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for machines without a CUDA device comes without it
    triton = tl = None

MIN_CAPABILITY = (8, 0)  # tensor cores with bfloat16
FEW_ROWS = 16  # as few as a tile may have
SPLIT_ROWS = 64  # with more, tiles are enough
# About six and three for each of an H200's 132 cores, and no part of K shorter than so many steps, unless there are
# less than two; measured there. Constants, for the bits are not to depend on a device.
FEW_ROWS_TILES, TILES_WANTED, LEAST_TILES, LEAST_STEPS = 768, 384, 256, 4


def is_available(device: torch.device) -> bool:
    """Whether the kernels run there: a CUDA device of compute capability 8.0 or more, and triton is installed."""
    if triton is None or device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def matmul(x_UK: torch.Tensor, packed_NJ: torch.Tensor, scale_NQ: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """alpha (x Wᵀ), summed in float32; float32 x is multiplied in float32.

    Args:
        x_UK: bfloat16 or float32 [U, K], U > 0.
        packed_NJ: uint8 [N, K/2].
        scale_NQ: e4m3 [N, K/16].
        alpha: float32 [] or [N].
    Returns:
        float32 [U, N].
    """
    weight = _Weight(packed_NJ[None], scale_NQ[None], alpha.reshape(1, -1))
    if len(x_UK) == 1:
        return _vectors(x_UK, weight, None)
    return _tiles(x_UK, weight, _tiling(x_UK, len(packed_NJ), rows=len(x_UK), may_split=True))


def expert_matmul(
    x_AK: torch.Tensor,
    packed_ENJ: torch.Tensor,
    scale_ENQ: torch.Tensor,
    alpha_ES: torch.Tensor,
    experts_A: torch.Tensor,
    *,
    ask_host: bool = True,
) -> torch.Tensor:
    """Every row times the weight of its own expert.

    Few rows are vectors, each with a grid of its own. More of them are sorted by expert into tiles of one expert each;
    how many tiles that may be is known from shapes, and those that are not needed return at once.

    Args:
        x_AK: bfloat16 or float32 [A, K], A > 0.
        packed_ENJ: uint8 [E, N, K/2].
        scale_ENQ: e4m3 [E, N, K/16].
        alpha_ES: float32 [E, S]; expert e multiplies the s-th of S equal runs of its N rows by alpha[e, s].
        experts_A: int64 [A], from 0 to E - 1.
        ask_host: for the reference's sake; here no host is asked either way.
    Returns:
        float32 [A, N].
    """
    weight = _Weight(packed_ENJ, scale_ENQ, alpha_ES)
    num_experts, num_rows = packed_ENJ.shape[:2]
    if 2 * len(x_AK) <= num_experts:  # up to here four of five rows have an expert to themselves
        return _vectors(x_AK, weight, experts_A)
    sorted_A, order_A = experts_A.sort(stable=True)
    ends_E = torch.searchsorted(sorted_A, torch.arange(num_experts, device=x_AK.device), right=True)
    tiling = _tiling(x_AK, num_rows, rows=-(-len(x_AK) // num_experts), may_split=False)
    return _tiles(x_AK, weight, tiling, ends_E, order_A)


@dataclass(frozen=True, slots=True)
class _Weight:
    """A stack of E weights: packed [E, N, K/2], scale [E, N, K/16], alpha float32 [E, S]."""

    packed: torch.Tensor
    scale: torch.Tensor
    alpha: torch.Tensor

    def arguments(self) -> tuple[Any, ...]:
        num_rows, runs = self.packed.shape[1], self.alpha.shape[1]
        assert num_rows % runs == 0, f"{num_rows=} {runs=}"
        bytes_ = self.scale.contiguous().view(torch.uint8)
        return self.packed.contiguous(), bytes_, self.alpha.contiguous(), num_rows, self.packed.shape[2] * 2, runs


@dataclass(frozen=True, slots=True)
class _Tiling:
    """Sizes of a tile: rows of x, rows of the weight, elements of K at a time; and into how many K is split."""

    rows: int
    columns: int
    depth: int
    splits: int
    num_warps: int
    num_stages: int


def _tiling(x_UK: torch.Tensor, num_rows: int, *, rows: int, may_split: bool) -> _Tiling:
    """``rows``: how many of x there are for one weight."""
    size = next(size for size in (16, 32, 64, 128) if rows <= size or size == 128)
    if x_UK.dtype == torch.float32:  # multiplied without tensor cores: operands are repeated in registers
        tiling = _Tiling(rows=16, columns=32, depth=64, splits=1, num_warps=4, num_stages=3)
    elif size == FEW_ROWS:  # 128 bytes of a row of weights
        tiling = _Tiling(rows=16, columns=32, depth=256, splits=1, num_warps=2, num_stages=2)
    else:
        tiling = _Tiling(rows=size, columns=64, depth=128, splits=1, num_warps=4, num_stages=3)
    if not may_split or rows > SPLIT_ROWS:
        return tiling
    steps, tiles = -(-x_UK.shape[1] // tiling.depth), -(-num_rows // tiling.columns)
    wanted = FEW_ROWS_TILES if size == FEW_ROWS else TILES_WANTED
    splits = max(min(steps // LEAST_STEPS, wanted // tiles), min(steps, LEAST_TILES // tiles))
    return replace(tiling, splits=1 << max(0, splits.bit_length() - 1))  # a power of two, as the sizes of a model are


def _vectors(x_AK: torch.Tensor, weight: _Weight, experts_A: torch.Tensor | None) -> torch.Tensor:
    num_rows, columns = weight.packed.shape[1], 8
    out_AN = torch.empty(len(x_AK), num_rows, dtype=torch.float32, device=x_AK.device)
    grid = (-(-num_rows // columns), len(x_AK))
    has_experts = experts_A is not None
    packed, *others = weight.arguments()
    _vector_kernel[grid](
        x_AK.contiguous(),
        packed.view(torch.int32),
        *others,
        experts_A if has_experts else x_AK,
        out_AN,
        HAS_EXPERTS=has_experts,
        COLUMNS=columns,
        BLOCKS=min(128, max(2, triton.next_power_of_2(x_AK.shape[1] // 16))),
        num_warps=4,
    )
    return out_AN


def _tiles(
    x_AK: torch.Tensor,
    weight: _Weight,
    tiling: _Tiling,
    ends_E: torch.Tensor | None = None,
    order_A: torch.Tensor | None = None,
) -> torch.Tensor:
    num_rows, grouped = weight.packed.shape[1], ends_E is not None
    num_tiles = -(-len(x_AK) // tiling.rows)
    if grouped:  # every expert that is hit has one tile that may not be full
        hit = min(len(x_AK), len(weight.packed))
        num_tiles = hit + (len(x_AK) - hit) // tiling.rows
    shape = (tiling.splits, len(x_AK), num_rows)
    parts_CAN = torch.empty(shape, dtype=torch.float32, device=x_AK.device)
    packed, scale, alpha, *sizes, runs = weight.arguments()
    _tile_kernel[(-(-num_rows // tiling.columns), num_tiles, tiling.splits)](
        x_AK.contiguous(),
        packed,
        scale,
        alpha,
        *sizes,
        runs,
        ends_E if grouped else x_AK,
        order_A if grouped else x_AK,
        parts_CAN,
        len(x_AK),
        len(weight.packed),
        GROUPED=grouped,
        EXPERTS=triton.next_power_of_2(len(weight.packed)),
        ROWS=tiling.rows,
        COLUMNS=tiling.columns,
        DEPTH=tiling.depth,
        SPLITS=tiling.splits,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    if tiling.splits == 1:
        return parts_CAN[0]
    out_AN = torch.empty(shape[1:], dtype=torch.float32, device=x_AK.device)
    _sum_kernel[(-(-num_rows // 256), len(x_AK))](
        parts_CAN, alpha, out_AN, len(x_AK), num_rows, runs, SPLITS=tiling.splits, COLUMNS=256, num_warps=4
    )
    return out_AN


def _jit(kernel: Any) -> Any:
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _scales(bytes_):
    """e4m3 bits as float32: as float16's they are 1/256 of the value, but for NaN."""
    bits = ((bytes_.to(tl.uint16) & 127) << 7) | ((bytes_.to(tl.uint16) & 128) << 8)
    value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((bytes_ & 127) == 127, float("nan"), value)


@_jit
def _low_as_float16(bytes_):
    """The e2m1 number in the low bits, times 2^-14: its bits are float16's too, subnormals included."""
    wide = bytes_.to(tl.uint16)
    return (((wide & 7) << 9) | ((wide & 8) << 12)).to(tl.float16, bitcast=True)


@_jit
def _high_as_float16(bytes_):
    wide = bytes_.to(tl.uint16)
    return (((wide & 0x70) << 5) | ((wide & 0x80) << 8)).to(tl.float16, bitcast=True)


@_jit
def _two_as_float16(words, i: tl.constexpr):
    """Elements i and i + 4 of every word of eight, times 2^-14: both at once, as decoding takes longer than reading."""
    both = ((words << (12 - 4 * i)) & -0x7FFF8000) | (_moved(words, 9 - 4 * i) & 0x0E000E00)
    low, high = both.to(tl.uint16), (both >> 16).to(tl.uint16)
    return low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True)


@_jit
def _moved(words, by: tl.constexpr):
    """To the left, or for less than none to the right."""
    if by >= 0:
        return words << by
    else:  # noqa: RET505, the compiler needs to see one of two
        return words >> -by


@_jit
def _vector_kernel(
    x_ptr,
    words_ptr,
    scale_ptr,
    alpha_ptr,
    N,
    K,
    runs,
    experts_ptr,
    out_ptr,
    HAS_EXPERTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One row of x times COLUMNS rows of a weight, BLOCKS blocks of 16 along K at a time."""
    row = tl.program_id(1)
    expert = tl.load(experts_ptr + row).to(tl.int64) if HAS_EXPERTS else tl.zeros((), tl.int64)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    weight_row = expert * N + tl.minimum(n, N - 1)  # a row too many reads the last again, and is not stored
    total = tl.zeros((COLUMNS, BLOCKS), tl.float32)
    for first in range(0, K // 16, BLOCKS):
        q = first + tl.arange(0, BLOCKS)
        there = q < K // 16
        word = (q * 2)[:, None] + tl.arange(0, 2)[None, :]
        words = tl.load(
            words_ptr + weight_row[:, None, None] * (K // 8) + word[None, :, :], mask=there[None, :, None], other=0
        )
        scales = tl.load(scale_ptr + weight_row[:, None] * (K // 16) + q[None, :], mask=there[None, :], other=0)
        at_x = x_ptr + row.to(tl.int64) * K + word * 8
        sums = tl.zeros((COLUMNS, BLOCKS, 2), tl.float32)
        for i in tl.static_range(4):
            low, high = _two_as_float16(words, i)
            sums += low.to(tl.float32) * tl.load(at_x + i, mask=there[:, None], other=0.0).to(tl.float32)[None, :, :]
            x = tl.load(at_x + i + 4, mask=there[:, None], other=0.0).to(tl.float32)
            sums += high.to(tl.float32) * x[None, :, :]
        total += tl.sum(sums, axis=2) * _scales(scales)
    alpha = tl.load(alpha_ptr + expert * runs + tl.minimum(n, N - 1) // (N // runs))
    out = tl.sum(total, axis=1) * (alpha * 16384.0)
    tl.store(out_ptr + row.to(tl.int64) * N + n, out, mask=n < N)


@_jit
def _weights(bytes_, scales, dtype: tl.constexpr):
    """Even and odd elements of a tile of weights, times 2^-7 in bfloat16 and 1 in float32; all exact."""
    columns: tl.constexpr = bytes_.shape[0]
    depth: tl.constexpr = bytes_.shape[1]
    scales = _scales(scales)
    if dtype == tl.bfloat16:
        # as bfloat16, which has float32's exponents, e2m1's bits are 2^-126 of the value: one product undoes it
        scales = (scales * 6.64613997892457936e35).to(tl.bfloat16)  # 2^119, as 448 * 2^126 would overflow
        wide = bytes_.to(tl.uint16)
        low = (((wide & 7) << 6) | ((wide & 8) << 12)).to(tl.bfloat16, bitcast=True)
        high = (((wide & 0x70) << 2) | ((wide & 0x80) << 8)).to(tl.bfloat16, bitcast=True)
    else:
        scales = scales * 16384.0
        low = _low_as_float16(bytes_).to(tl.float32)
        high = _high_as_float16(bytes_).to(tl.float32)
    spread = tl.reshape(tl.broadcast_to(scales[:, :, None], (columns, depth // 8, 8)), (columns, depth))
    return low * spread, high * spread


@_jit
def _tile_of_group(ends_ptr, tile, num_experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Of the tile-th tile: its expert (num_experts if there is none), and where its rows begin and end in the order."""
    e = tl.arange(0, EXPERTS)
    starts = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e <= num_experts), other=0)
    ends = tl.load(ends_ptr + e, mask=e < num_experts, other=0)
    ends = tl.where(e < num_experts, ends, starts)
    tiles = (ends - starts + ROWS - 1) // ROWS
    until = tl.cumsum(tiles, axis=0)
    expert = tl.minimum(tl.sum((until <= tile).to(tl.int32), axis=0), num_experts)
    mine = e == expert
    first = tl.sum(tl.where(mine, starts + (tile - until + tiles) * ROWS, 0), axis=0)
    return expert, first, tl.sum(tl.where(mine, ends, 0), axis=0)


@_jit
def _tile_kernel(
    x_ptr,
    packed_ptr,
    scale_ptr,
    alpha_ptr,
    N,
    K,
    runs,
    ends_ptr,
    order_ptr,
    parts_ptr,
    A,
    num_experts,
    GROUPED: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """ROWS rows of x times COLUMNS rows of a weight, over one of SPLITS parts of K, DEPTH elements at a time."""
    tile, part = tl.program_id(1), tl.program_id(2)
    expert, first, end = tile * 0, tile * ROWS, A
    if GROUPED:
        expert, first, end = _tile_of_group(ends_ptr, tile, num_experts, EXPERTS, ROWS)
        if expert >= num_experts:
            return
    place = first + tl.arange(0, ROWS)
    row_there = place < end
    row = tl.load(order_ptr + place, mask=row_there, other=0) if GROUPED else place.to(tl.int64)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    weight_row = expert.to(tl.int64) * N + tl.minimum(n, N - 1)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    depth = tl.cdiv(tl.cdiv(K, DEPTH), SPLITS) * DEPTH
    for k in range(part * depth, tl.minimum(K, (part + 1) * depth), DEPTH):
        j, q, at_x = k // 2 + tl.arange(0, DEPTH // 2), k // 16 + tl.arange(0, DEPTH // 16), k + tl.arange(0, DEPTH)
        bytes_ = tl.load(packed_ptr + weight_row[:, None] * (K // 2) + j[None, :], mask=(j < K // 2)[None, :], other=0)
        scales = tl.load(scale_ptr + weight_row[:, None] * (K // 16) + q[None, :], mask=(q < K // 16)[None, :], other=0)
        x = tl.load(x_ptr + row[:, None] * K + at_x[None, :], mask=row_there[:, None] & (at_x < K)[None, :], other=0.0)
        even, odd = tl.split(tl.reshape(x, (ROWS, DEPTH // 2, 2)))
        low, high = _weights(bytes_, scales, dtype)
        total = tl.dot(low, tl.trans(even), total, input_precision="ieee")
        total = tl.dot(high, tl.trans(odd), total, input_precision="ieee")
    out_ptr = parts_ptr + (part.to(tl.int64) * A + row[None, :]) * N + n[:, None]
    if dtype == tl.bfloat16:
        total = total * 128.0
    if SPLITS == 1:
        alpha = tl.load(alpha_ptr + expert * runs + tl.minimum(n, N - 1) // (N // runs))
        total = total * alpha[:, None]
    tl.store(out_ptr, total, mask=(n < N)[:, None] & row_there[None, :])


@_jit
def _sum_kernel(parts_ptr, alpha_ptr, out_ptr, A, N, runs, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds the parts of K in their order, and multiplies by alpha."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for part in range(SPLITS):
        total += tl.load(parts_ptr + (part * A + row) * N + n, mask=n < N, other=0.0)
    alpha = tl.load(alpha_ptr + tl.minimum(n, N - 1) // (N // runs))
    tl.store(out_ptr + row * N + n, total * alpha, mask=n < N)
