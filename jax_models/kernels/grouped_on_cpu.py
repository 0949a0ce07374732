"""Rows in groups, each times the matrix of its own group, on a CPU: tile by tile, only groups that have rows.

XLA's own ``ragged_dot`` for a CPU multiplies all rows by the matrix of every group and adds zeros: 8 of 64 experts cost
as much as 64 (60 times what they do here), and an infinite weight of one makes NaN of everybody's rows.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

_MOST_ROWS = 128  # of a tile


def grouped_on_cpu(rows_AK: jax.Array, sizes_E: jax.Array, weight_of: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Rows times the transposed matrix of their group -> float32 [A, N]; rows behind the last group are anything.

    It has no derivative of its own, as nothing that loops so has: see ``jax_models.jvp``.

    Args:
        rows_AK: group after group.
        sizes_E: int32, rows of each group.
        weight_of: the matrix of a group, [N, K], given its index, int32 []; see ``one_of``.
    """
    A, E = len(rows_AK), len(sizes_E)
    size = min(_MOST_ROWS, 1 << (A // E).bit_length())  # up to twice the mean of a group, so that most take one tile
    tiles_E = -(-sizes_E // size)
    first_E, end_E = jnp.cumsum(sizes_E) - sizes_E, jnp.cumsum(tiles_E)
    padded_UK = jnp.pad(rows_AK, ((0, size), (0, 0))).astype(jnp.float32)

    def add(tile: jax.Array, found_UN: jax.Array) -> jax.Array:
        group = jnp.minimum(jnp.searchsorted(end_E, tile, side="right"), E - 1)
        # a tile may reach into the next group, whose own come later and write over what it says there
        row = first_E[group] + size * (tile - end_E[group] + tiles_E[group])
        rows = jax.lax.dynamic_slice_in_dim(padded_UK, row, size)
        weight = weight_of(group).astype(jnp.float32)
        found = jax.lax.dot_general(rows, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(found_UN, found, row, axis=0)

    N = jax.eval_shape(weight_of, jax.ShapeDtypeStruct((), jnp.int32)).shape[0]
    return jax.lax.fori_loop(0, end_E[-1], add, jnp.zeros((A + size, N), jnp.float32))[:A]


def one_of(stack: jax.Array, group: jax.Array) -> jax.Array:
    """One matrix of a stack [E, ...], inside of a loop: of bfloat16 XLA would cast the whole stack in front of it."""
    stack, group = jax.lax.optimization_barrier((stack, group))
    return jax.lax.dynamic_index_in_dim(stack, group, keepdims=False)
