"""Rows in groups, each times the matrix of its own group: products of experts, whose stacks stay as they are stored."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import megablox

from jax_models.jvp import with_jvp_of
from jax_models.kernels.grouped_on_cpu import grouped_on_cpu, one_of
from jax_models.kernels.heads import LANES

# [A, k] x [E, n, k] -> [A, n], rows in groups along A
_BY_GROUP = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [2]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)
TILE_ROWS = 128
_TILE_BYTES = 2**21  # of a block of weights; two of them, rows and results fit 16 MiB of VMEM


def grouped_matmul(
    rows: jax.Array, weights: jax.Array, sizes: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """rows [A, k] times weights [E, n, k] -> [A, n]; rows behind the last group come out as anything.

    Summed in float32 and rounded to ``dtype`` at the end. Decided when the program is lowered, by the platform it is
    lowered for.

    Args:
        rows: [A, k], group after group.
        weights: [E, n, k], of the dtype of the rows.
        sizes: int32 [E], rows of each group.
        dtype: of what is returned.
    """
    on_tpu, elsewhere = partial(grouped_on_tpu, dtype=dtype), partial(_ragged, dtype=dtype)
    on_cpu = with_jvp_of(elsewhere, partial(_tiled, dtype=dtype))
    return jax.lax.platform_dependent(rows, weights, sizes, tpu=on_tpu, cpu=on_cpu, default=elsewhere)


def ragged_matmul(
    rows: jax.Array, weights: jax.Array, sizes: jax.Array, precision: jax.lax.PrecisionLike = None
) -> jax.Array:
    """The same by XLA's own product, in float32."""
    return jax.lax.ragged_dot_general(
        rows, weights, sizes, _BY_GROUP, precision=precision, preferred_element_type=jnp.float32
    )


def _ragged(rows: jax.Array, weights: jax.Array, sizes: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return ragged_matmul(rows, weights, sizes).astype(dtype)


def _tiled(rows: jax.Array, weights: jax.Array, sizes: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return grouped_on_cpu(rows, sizes, partial(one_of, weights)).astype(dtype)


def grouped_on_tpu(
    rows: jax.Array,
    weights: jax.Array,
    sizes: jax.Array,
    dtype: jax.typing.DTypeLike = jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """The same by a kernel that reads the stacks as they are stored, and of them only the groups that have rows.

    XLA's own ``ragged_dot`` for TPU wants [E, k, n]: it would write a transposed copy of every stack at every step
    (407 MB a device and step for two layers of Qwen3-30B-A3B on four v5e). Where k fills no whole lanes and n does,
    arrays lie in HBM with n innermost, since nothing is padded so, and are read as [E, k, n], or they would be copied.
    """
    (A, k), n = rows.shape, weights.shape[1]
    tile = min(TILE_ROWS, -(-A // 16) * 16)  # 16 rows of bfloat16 fill a register
    padded = jnp.pad(rows, ((0, -A % tile), (0, 0)))
    width = min(k, 4096)
    columns = max(128, _TILE_BYTES // (width * rows.dtype.itemsize) // 128 * 128)
    tiling = (tile, width, min(n, columns))
    is_turned = bool(k % LANES) and not n % LANES
    given = weights.swapaxes(1, 2) if is_turned else weights
    return megablox.gmm(padded, given, sizes, jnp.dtype(dtype), tiling, None, None, not is_turned, interpret)[:A]
