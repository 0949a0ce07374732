"""The kernel of NVFP4 products on TPU: blocks of a weight's codes, expanded where they are multiplied by tiles of rows.

Letters as in ``nvfp4_reference.py``.

How codes become bfloat16 without a table: a word of four bytes holds rows 4i .. 4i+3 of one column, because that is
how bytes are tiled on TPU, so plain 32-bit operations work on eight codes at once, and a masked word is two bfloat16
(rows 4i and 4i+2, or 4i+1 and 4i+3) where two and two belong together. Even outputs come out before odd ones and are
put in order when a tile is finished. Even elements of K lie in low nibbles and odd ones in high nibbles, so the rows
are cut in even and odd columns before the kernel, and before they are gathered where one row goes to many groups.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_models.kernels.heads import LANES
from loaders.quantization.schemes import BLOCK

Ref = Any  # what Pallas hands to a kernel: memory, read and written by index
Index = Any  # int, or one that is known when the kernel runs

_ROW_PACK = 16  # rows of bfloat16 fill a register
_OUTPUTS = 512  # of a block of weights; with 1024 bytes of each, two such blocks, rows and results fit 16 MiB of VMEM
_BYTES = 1024  # of a row: the scales of 1024 bytes are 128, one lane each
_GROUP = 256  # outputs expanded at a time: 128 even ones and 128 odd ones, whole lanes of a result
_RESIDENT_BYTES = 2**20  # of a tile of even columns: as many stay in VMEM for all blocks of weights
_BLOCK_BYTES = BLOCK // 2
_NT = (((1,), (1,)), ((), ()))  # both contract their second axis
# whatever precision a program of float32 asks for: of bfloat16 that would be more passes, which Mosaic has not
_PLAIN: dict[str, Any] = {"precision": jax.lax.Precision.DEFAULT, "preferred_element_type": jnp.float32}
_UNIT = 2.0**-62  # what the code of 1.0 becomes, see _patterns


class Blocks(NamedTuple):
    """Sizes of what the kernel holds at a time."""

    rows: int  # of x, multiple of 16, and of 128 if they are more
    outputs: int  # of a weight, multiple of 256
    bytes: int  # of a weight's row, multiple of 128
    steps: int  # of so many bytes to a row; the last may reach beyond it
    resident: bool  # all columns of a tile of x at once

    def missing(self, J: int) -> int:
        """Bytes by which the last block reaches beyond a row's end."""
        return self.steps * self.bytes - J


def blocks_of(num_rows: int, most_rows: int, N: int, J: int) -> Blocks:
    """A block of outputs divides N if it can; of K it need not, what lies behind a row's end is masked."""
    unit = _ROW_PACK if num_rows <= LANES else LANES
    rows = min(most_rows, pl.cdiv(num_rows, unit) * unit)
    outputs = _OUTPUTS if N % _OUTPUTS == 0 or N % _GROUP else _GROUP
    num_bytes = min(_BYTES, pl.cdiv(J, LANES) * LANES)
    steps = pl.cdiv(J, num_bytes)
    resident = rows * steps * num_bytes * 2 <= _RESIDENT_BYTES
    return Blocks(rows, min(outputs, pl.cdiv(N, _GROUP) * _GROUP), num_bytes, steps, resident)


def run(
    halves: tuple[jax.Array, ...],
    packed_ENJ: jax.Array,
    scale_ENQ: jax.Array,
    alphas_EH: jax.Array,
    tiles: tuple[jax.Array, ...],
    num_tiles: int | jax.Array,
    blocks: Blocks,
    dtype: jax.typing.DTypeLike,
    interpret: bool,
) -> jax.Array:
    """Rows times the weights of their groups, dtype [A, N]: over blocks of outputs, then tiles of rows (one for each
    group in it), then blocks of K.

    ``halves``: even and odd columns of the rows. ``tiles``, read before the grid starts as alphas are: where groups
    start [E + 1], and of every tile its group and its number.
    """
    A, (_, N, J) = len(halves[0]), packed_ENJ.shape
    packed_ENJ, scale_ENQ = _whole_lanes(packed_ENJ, scale_ENQ)
    is_narrow = scale_ENQ.shape[-1] < LANES
    scale = scale_ENQ.swapaxes(1, 2) if is_narrow else scale_ENQ  # as XLA lays out what is narrow, else a copy a call
    # all groups: how many of them have rows is not known here
    num_bytes = packed_ENJ.nbytes + scale_ENQ.nbytes + 2 * halves[0].nbytes + jnp.dtype(dtype).itemsize * A * N
    kernel = partial(
        _kernel,
        blocks=blocks,
        num_scales=scale_ENQ.shape[-1],
        is_narrow=is_narrow,
        num_alphas=alphas_EH.shape[1],
        num_outputs=N,
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((A, N), dtype),
        grid_spec=_grid_spec(blocks, pl.cdiv(N, blocks.outputs), num_tiles, is_narrow),
        cost_estimate=pl.CostEstimate(flops=4 * A * N * J, bytes_accessed=num_bytes, transcendentals=0),
        interpret=interpret,
        name="nvfp4_matmul",
    )(*tiles, alphas_EH.reshape(-1), *halves, packed_ENJ, scale)


def _whole_lanes(packed_ENJ: jax.Array, scale_ENQ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A copy, with zeros, of narrow weights whose rows do not fill whole lanes, as of Qwen3-235B on tensor=4."""
    J = packed_ENJ.shape[-1]
    missing = 0 if J > _BYTES else -J % LANES
    if not missing:
        return packed_ENJ, scale_ENQ
    padded = jnp.pad(packed_ENJ, ((0, 0), (0, 0), (0, missing)))
    return padded, jnp.pad(scale_ENQ, ((0, 0), (0, 0), (0, missing * 2 // BLOCK)))


def columns(x_AK: jax.Array, missing: int) -> tuple[jax.Array, jax.Array]:
    """Even and odd columns, with zeros where the last block of weights reaches beyond a row's end."""
    low_AJ, high_AJ = x_AK[:, ::2], x_AK[:, 1::2]
    return jnp.pad(low_AJ, ((0, 0), (0, missing))), jnp.pad(high_AJ, ((0, 0), (0, missing)))


def _grid_spec(
    blocks: Blocks, num_outputs: int, num_tiles: int | jax.Array, is_narrow: bool
) -> pltpu.PrefetchScalarGridSpec:
    """A tile beyond ``num_tiles`` is not run, so it fetches nothing."""

    def x_at(
        _: Index, tile: Index, k: Index, starts: Ref, groups: Ref, numbers: Ref, _alphas: Ref
    ) -> tuple[Index, ...]:
        return numbers[tile], 0 if blocks.resident else k

    def weight_at(
        n: Index, tile: Index, k: Index, starts: Ref, groups: Ref, numbers: Ref, _alphas: Ref
    ) -> tuple[Index, ...]:
        return groups[tile], n, k

    def found_at(
        n: Index, tile: Index, _: Index, starts: Ref, groups: Ref, numbers: Ref, _alphas: Ref
    ) -> tuple[Index, ...]:
        return numbers[tile], n

    def narrow_at(
        n: Index, tile: Index, k: Index, starts: Ref, groups: Ref, numbers: Ref, _alphas: Ref
    ) -> tuple[Index, ...]:
        return groups[tile], k, n

    num_scales = blocks.bytes * 2 // BLOCK
    scale_spec = pl.BlockSpec((None, blocks.outputs, num_scales), weight_at)
    if is_narrow:
        scale_spec = pl.BlockSpec((None, num_scales, blocks.outputs), narrow_at)
    x_spec = pl.BlockSpec((blocks.rows, blocks.bytes * (blocks.steps if blocks.resident else 1)), x_at)
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(num_outputs, num_tiles, blocks.steps),
        in_specs=[
            x_spec,
            x_spec,
            pl.BlockSpec((None, blocks.outputs, blocks.bytes), weight_at),
            scale_spec,
        ],
        out_specs=pl.BlockSpec((blocks.rows, blocks.outputs), found_at),
        scratch_shapes=[
            pltpu.VMEM((num_scales, blocks.bytes), jnp.bfloat16),
            pltpu.VMEM((blocks.outputs, num_scales), jnp.float32),
            pltpu.VMEM((blocks.rows, blocks.outputs), jnp.float32),
            pltpu.VMEM((_GROUP, min(blocks.rows, LANES)), jnp.float32),
        ],
    )


def _kernel(
    starts: Ref,
    groups: Ref,
    numbers: Ref,
    alphas: Ref,
    low: Ref,
    high: Ref,
    packed: Ref,
    scale: Ref,
    found: Ref,
    spread: Ref,
    scales: Ref,
    sums: Ref,
    turned: Ref,
    *,
    blocks: Blocks,
    num_scales: int,
    is_narrow: bool,
    num_alphas: int,
    num_outputs: int,
) -> None:
    """One block of a weight times one tile of rows, added to ``sums``; ``found`` is written after the last of K.

    Scratch: ``spread`` [16ths, bytes] of 0 and 1 repeats a scale over its 8 bytes, ``scales`` float32 [outputs, 16ths],
    ``sums`` float32 [rows, outputs], even outputs of 256 before odd ones, and ``turned`` to put them in order.
    """
    n, tile, k = (pl.program_id(axis) for axis in range(3))

    @pl.when((n == 0) & (tile == 0) & (k == 0))
    def _first() -> None:
        row, column = (jax.lax.broadcasted_iota(jnp.int32, spread.shape, axis) for axis in (0, 1))
        is_of_block = (column >= row * _BLOCK_BYTES) & (column < (row + 1) * _BLOCK_BYTES)
        spread[...] = is_of_block.astype(jnp.float32).astype(jnp.bfloat16)

    @pl.when(k == 0)
    def _start() -> None:
        sums[...] = jnp.zeros_like(sums)

    is_inside = jax.lax.broadcasted_iota(jnp.int32, scales.shape, 1) < num_scales - k * scales.shape[1]
    block = scale[...].astype(jnp.float32).T if is_narrow else scale[...].astype(jnp.float32)
    scales[...] = jnp.where(is_inside, block / _UNIT, 0.0)  # behind a row's end is anything
    first = pl.multiple_of(k * blocks.bytes, LANES) if blocks.resident else 0

    def add(group: Index, _: None) -> None:
        outputs = pl.ds(pl.multiple_of(group * _GROUP, _GROUP), _GROUP)
        for half, weight_NJ in zip((low, high), _expanded(packed, scales, spread, group), strict=True):
            x = half[:, pl.ds(first, blocks.bytes)]
            sums[:, outputs] += jax.lax.dot_general(x, weight_NJ, _NT, **_PLAIN)

    jax.lax.fori_loop(0, blocks.outputs // _GROUP, add, None)

    @pl.when(k == blocks.steps - 1)
    def _finish() -> None:
        for part in itertools.product(range(0, blocks.rows, turned.shape[1]), range(0, blocks.outputs, _GROUP)):
            _in_order(sums, turned, *part)
        row = jax.lax.broadcasted_iota(jnp.int32, found.shape, 0) + numbers[tile] * blocks.rows
        is_of_group = (row >= starts[groups[tile]]) & (row < starts[groups[tile] + 1])
        output = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1) + n * blocks.outputs
        alpha = alphas[groups[tile] * num_alphas]
        for part in range(1, num_alphas):
            is_before = output < part * (num_outputs // num_alphas)
            alpha = jnp.where(is_before, alpha, alphas[groups[tile] * num_alphas + part])
        scaled = sums[...] * alpha
        found[...] = jnp.where(is_of_group, scaled.astype(found.dtype), found[...])


def _in_order(sums: Ref, turned: Ref, row: int, output: int) -> None:
    """Interleaves 128 even and 128 odd outputs: transposed, for rows can be written two apart and lanes cannot."""
    rows, half = pl.ds(row, turned.shape[1]), _GROUP // 2
    turned[pl.ds(0, half, 2), :] = sums[rows, pl.ds(output, half)].T
    turned[pl.ds(1, half, 2), :] = sums[rows, pl.ds(output + half, half)].T
    sums[rows, pl.ds(output, _GROUP)] = turned[...].T


def _expanded(packed: Ref, scales: Ref, spread: Ref, group: Index) -> tuple[jax.Array, jax.Array]:
    """N = 256 outputs as bfloat16 [N, J]: of the low nibbles and of the high ones, even outputs before odd ones."""
    first = pl.multiple_of(group * _GROUP, _GROUP)
    even_and_odd = [scales[pl.ds(first + odd, _GROUP // 2, 2), :] for odd in (0, 1)]
    scale_NQ = jnp.concatenate(even_and_odd, axis=0).astype(jnp.bfloat16)
    factor_NJ = jnp.dot(scale_NQ, spread[...], **_PLAIN).astype(jnp.bfloat16)  # exact
    low_NJ, high_NJ = _patterns(pltpu.bitcast(packed[pl.ds(first, _GROUP), :], jnp.int32))
    return low_NJ * factor_NJ, high_NJ * factor_NJ


def _patterns(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32 [64, J] of eight codes -> bfloat16 [256, J] times 2^-62: low nibbles and high ones, even rows first.

    bfloat16 is seeeeeee emmmmmmm. Exponent and mantissa of a code go to bits 8..6 and a 1 to bit 13 unless it is 0, so
    exponents start at 64. A code of 1 (0.5), subnormal as e2m1, is the smallest exponent without its mantissa bit.
    """
    is_normal = (words | _right(words, 1)) & _mask(0x22222222)  # bit 1 of a nibble: an exponent bit is set
    is_nonzero = (is_normal | (words << 1)) & _mask(0x22222222)
    sign_and_nonzero = (words & _mask(0x88888888)) | is_nonzero
    magnitude = words & (_right(is_normal, 1) | _mask(0xEEEEEEEE))

    def pick(shift: int) -> jax.Array:
        """Codes at bits ``shift`` and ``shift`` + 16: two rows that are neighbours among the even ones, or the odd."""
        bits = _right(magnitude, shift - 6) & _mask(0x01C001C0)
        return bits | (_right(sign_and_nonzero, shift - 12) & _mask(0xA000A000))

    low, high = (jnp.concatenate((pick(at), pick(at + 8)), axis=0) for at in (0, 4))
    return pltpu.bitcast(low, jnp.bfloat16), pltpu.bitcast(high, jnp.bfloat16)


def _mask(bits: int) -> jax.Array:
    return jnp.int32(bits - 2**32 if bits >= 2**31 else bits)


def _right(words: jax.Array, shift: int) -> jax.Array:
    if shift < 0:
        return words << -shift
    return jax.lax.shift_right_logical(words, jnp.int32(shift)) if shift else words
