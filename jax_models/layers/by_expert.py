"""Rows in the order of the experts that tokens chose: sorted, and what comes of them summed token by token."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_models.kernels.grouped import TILE_ROWS

_FEW_BYTES = 2**25  # of all rows: a v5e's compiler keeps as many in VMEM, and HBM sees none of them


def by_expert(experts: jax.Array, first: jax.Array | int, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A choices in the order of the experts ``first`` .. ``first + num_experts - 1``, E of them, that are here.

    Returns:
        group_A: which of them each choice is, in the order of tokens; E is a stranger.
        order_A: the choices sorted by it: strangers lie behind every group and are never multiplied.
        size_E: int32, how many each expert has.
    """
    expert_A = experts.reshape(-1) - first
    group_A = jnp.where((expert_A >= 0) & (expert_A < num_experts), expert_A, num_experts)
    size_E = jnp.bincount(group_A, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    return group_A, jnp.argsort(group_A, stable=True), size_E


def of_those_here(
    run: Callable[[jax.Array], jax.Array], order_A: jax.Array, size_E: jax.Array, x_BTD: jax.Array, parts: int
) -> jax.Array:
    """``run`` on the choices of experts that are here, and as many strangers behind them as shapes ask for.

    Any routing is possible, also all tokens to the experts of one device, so the program for all rows has to be there.
    Beside it is one for twice the rows of a device's even share, which runs where that is enough.

    Args:
        run: of choices in the order of experts, [A] or fewer.
        order_A: all of them.
        size_E: how many each expert that is here has.
        x_BTD: what they choose experts for.
        parts: devices that share the experts.
    """
    few = -(-2 * len(order_A) // (parts * TILE_ROWS)) * TILE_ROWS
    if few >= len(order_A) or len(order_A) * x_BTD.shape[-1] * x_BTD.dtype.itemsize <= _FEW_BYTES:
        return run(order_A)
    return jax.lax.cond(jnp.sum(size_E) <= few, lambda: run(order_A[:few]), lambda: run(order_A))


def weighed(out: jax.Array, order_A: jax.Array, is_here_A: jax.Array, weights_BTX: jax.Array) -> jax.Array:
    """What experts made of every token, summed by its weights: float32 [B, T, D].

    Args:
        out: [A, D] in the order of experts, whose rows may be anything where they are not here; or fewer rows, of
            which none is missing that is here.
        order_A: which choice of which token each row is.
        is_here_A: in the order of tokens.
        weights_BTX: float32.
    """
    lead, X = weights_BTX.shape[:-1], weights_BTX.shape[-1]
    place_A = jnp.minimum(jnp.argsort(order_A), len(out) - 1)
    # many rows choice by choice: put in order all at once they would be written to HBM and read again
    step = X if len(order_A) * out.shape[1] * out.dtype.itemsize <= _FEW_BYTES else 1
    by_step = tuple(x.reshape(-1, X).T.reshape(X // step, step, -1) for x in (place_A, is_here_A, weights_BTX))

    def add(total_UD: jax.Array, given: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        place_XU, is_here_XU, weight_XU = given
        # XLA for TPU would cast all rows to float32 in a pass of its own; behind a barrier they are as they are summed
        out_XUD = jax.lax.optimization_barrier(out[place_XU]).astype(jnp.float32)
        # before they are multiplied: a weight's gradient is the row, and a stranger's may be NaN
        out_XUD = jnp.where(is_here_XU[..., None], out_XUD, 0.0)
        return total_UD + jnp.sum(out_XUD * weight_XU[..., None], axis=0), None  # a TPU would round a matmul's operands

    nothing_UD = jnp.zeros((len(order_A) // X, out.shape[1]), jnp.float32)
    return jax.lax.scan(add, nothing_UD, by_step)[0].reshape(*lead, -1)
