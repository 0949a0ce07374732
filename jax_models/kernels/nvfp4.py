"""Products with NVFP4 weights on TPU: codes are expanded inside the kernel and never written back as bfloat16.

Letters as in ``nvfp4_reference.py``, which holds the same functions for every other platform;
the kernel is in ``nvfp4_tiles.py``.

Compiled for a v5e, 2^19 weights of a decode step take 1200 bundles, so 4096 x 12288 some 90 us at 1.5 GHz; to read it
at 819 GB/s takes 123 us as bfloat16 and 35 us as codes. In prefill the expansion hides behind the MXU: 4426 bundles
for 512 rows, of which the MXU needs 4096.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

from jax_models.jvp import with_jvp_of
from jax_models.kernels.nvfp4_reference import (
    check_alphas,
    check_rows,
    check_weight,
    dequantized,
    reference_grouped_matmul,
    reference_matmul,
)
from jax_models.kernels.nvfp4_tiles import blocks_of, columns, run

__all__ = [
    "dequantized",
    "grouped_matmul",
    "matmul",
    "nvfp4_grouped_matmul",
    "nvfp4_matmul",
    "reference_grouped_matmul",
    "reference_matmul",
]

_TILE, _GROUPED_TILE = 512, 128  # rows: enough to hide the expansion; few, where most groups are smaller


def nvfp4_matmul(x_TK: jax.Array, packed_NJ: jax.Array, scale_NQ: jax.Array) -> jax.Array:
    """x [T, K] times the transposed weight [N, K] -> float32 [T, N], by what the platform does best.

    Decided when the program is lowered, by the platform it is lowered for. Arguments as of ``matmul``.
    """
    return jax.lax.platform_dependent(x_TK, packed_NJ, scale_NQ, tpu=matmul, default=reference_matmul)


def nvfp4_grouped_matmul(
    x_UK: jax.Array,
    packed_ENJ: jax.Array,
    scale_ENQ: jax.Array,
    alphas_EH: jax.Array,
    sizes_E: jax.Array,
    row_A: jax.Array | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Rows in groups, each times its weight and alpha -> [A, N]; decided like ``nvfp4_matmul``.

    Arguments as of ``grouped_matmul``.
    """
    on_tpu, elsewhere = (partial(product, dtype=dtype) for product in (grouped_matmul, reference_grouped_matmul))
    on_cpu = with_jvp_of(elsewhere, partial(elsewhere, by_tiles=True))
    given = (x_UK, packed_ENJ, scale_ENQ, alphas_EH, sizes_E, *(() if row_A is None else (row_A,)))
    return jax.lax.platform_dependent(*given, tpu=on_tpu, cpu=on_cpu, default=elsewhere)


def matmul(x_TK: jax.Array, packed_NJ: jax.Array, scale_NQ: jax.Array, *, interpret: bool = False) -> jax.Array:
    """x times the transposed weight; products are exact, sums are float32.

    Args:
        x_TK: bfloat16 or float32 [T, K].
        packed_NJ: uint8 [N, K/2]; two e2m1 codes per byte, even element in the low bits.
        scale_NQ: float8_e4m3fn [N, K/16]; one per 16 elements along K.
        interpret: run as plain operations, for tests without a TPU.

    Returns:
        float32 [T, N], without the global scale.

    Raises:
        ValueError: shapes or dtypes do not belong together.
    """
    check_weight(packed_NJ, scale_NQ)
    check_rows(x_TK, packed_NJ)
    rows_AK = _as_bfloat16(x_TK)
    A, (N, J) = len(rows_AK), packed_NJ.shape
    blocks = blocks_of(A, _TILE, N, J)
    num_tiles = pl.cdiv(A, blocks.rows)
    group_of_tile = jnp.zeros(num_tiles, jnp.int32)
    tiles = (jnp.array([0, A], jnp.int32), group_of_tile, jnp.arange(num_tiles, dtype=jnp.int32))
    ones, halves = jnp.ones((1, 1), jnp.float32), columns(rows_AK, blocks.missing(J))
    found_AN = run(halves, packed_NJ[None], scale_NQ[None], ones, tiles, num_tiles, blocks, jnp.float32, interpret)
    return found_AN.reshape(len(x_TK), -1, N).sum(axis=1)


def grouped_matmul(
    x_UK: jax.Array,
    packed_ENJ: jax.Array,
    scale_ENQ: jax.Array,
    alphas_EH: jax.Array,
    sizes_E: jax.Array,
    row_A: jax.Array | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """Rows sorted by group, each times its group's weight and alpha; only groups that have rows are read.

    Args:
        x_UK: bfloat16 or float32 [U, K].
        packed_ENJ: uint8 [E, N, K/2].
        scale_ENQ: float8_e4m3fn [E, N, K/16].
        alphas_EH: float32; of H equal parts of the outputs each is multiplied by its own.
        sizes_E: int32; their sum may be less than A.
        row_A: int32, the rows of x in the order of groups: the first ``sizes_E[0]`` belong to group 0, and so on.
            None: x is in that order.
        dtype: of the result; summed and multiplied by alpha in float32, and rounded once.
        interpret: run as plain operations, for tests without a TPU.

    Returns:
        dtype [A, N]; rows behind the last group come out as anything.

    Raises:
        ValueError: shapes or dtypes do not belong together.
    """
    check_weight(packed_ENJ, scale_ENQ)
    check_rows(x_UK, packed_ENJ)
    check_alphas(alphas_EH, packed_ENJ)
    parts = _as_bfloat16(x_UK)
    num_parts, num_rows = len(parts) // len(x_UK), len(x_UK if row_A is None else row_A)
    E, N, J = packed_ENJ.shape
    blocks = blocks_of(num_parts * num_rows, _GROUPED_TILE, N, J)
    halves = columns(parts, blocks.missing(J))
    if row_A is not None:  # the columns of U rows were cut, not those of A
        halves = tuple(half.reshape(len(x_UK), -1)[row_A].reshape(num_parts * num_rows, -1) for half in halves)
    tiles, num_tiles = make_group_metadata(
        group_sizes=num_parts * sizes_E,
        m=pl.cdiv(num_parts * num_rows, blocks.rows) * blocks.rows,
        tm=blocks.rows,
        start_group=jnp.int32(0),
        num_nonzero_groups=E,
        visit_empty_groups=False,
    )
    stored = dtype if num_parts == 1 else jnp.float32
    found = run(halves, packed_ENJ, scale_ENQ, alphas_EH, tiles, num_tiles, blocks, stored, interpret)
    return found if num_parts == 1 else found.reshape(num_rows, num_parts, N).sum(axis=1).astype(dtype)


def _as_bfloat16(x_AK: jax.Array) -> jax.Array:
    """bfloat16 [A, K] as it is; float32 as [3 * A, K], three neighbours that sum to a row exactly.

    Half the work of a float32 product, which takes the MXU six passes.
    """
    if x_AK.dtype == jnp.bfloat16:
        return x_AK
    parts = []
    for _ in range(3):
        parts.append(jax.lax.reduce_precision(x_AK, 8, 7))  # a cast there and back would be optimised away
        x_AK = x_AK - parts[-1]
    return jnp.stack(parts, axis=1).reshape(-1, x_AK.shape[1]).astype(jnp.bfloat16)
