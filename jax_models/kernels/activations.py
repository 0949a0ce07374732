"""Activations in e2m1 with a scale for every 16, as the weights' exporter does it. All of it in float32.

Source: modelopt ``NVFP4QTensor.quantize``; the same bits in tests/models/test_nvfp4_exports.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from loaders.quantization.schemes import BLOCK

E2M1_MAX, E4M3_MAX, E4M3_MIN = 6.0, 448.0, 2.0**-9


def activation_codes(x: jax.Array, input_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes and block scales of activations.

    The scale is the block's amax / (6 input_scale) rounded to e4m3, 1 for a block of zeros. Codes are the nearest, ties
    to the even one, and 6 beyond it; the sign is that of the quotient, so -0 becomes 0. Where a quotient is NaN (an
    input scale of 0, say) codes are those of 6. XLA takes denormal numbers for 0, on a CPU and on a TPU: inputs and
    scales below 2^-126 have other codes than modelopt's.

    Args:
        x: bfloat16 or float32 [..., K].
        input_scale: float32 [], or what broadcasts against [..., K/16].
    Returns:
        codes: uint8 [..., K], one a byte.
        scale: e4m3 [..., K/16].
    """
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, BLOCK)
    amax, by = jnp.max(jnp.abs(blocks), axis=-1), E2M1_MAX * input_scale
    # denormal quotients would be 0 here: whether they are is asked of their operands. Rounded they are up to 2^-150
    is_zero = (amax * 2.0**64 <= by * 2.0**-86) & (by > 0)
    scale = jnp.clip(jnp.where(is_zero, 1.0, divided(amax, by)), E4M3_MIN, E4M3_MAX).astype(jnp.float8_e4m3fn)
    step = (scale.astype(jnp.float32) * input_scale)[..., None]
    is_negative = blocks * 2.0**64 < step * -(2.0**-86)
    return _nearest_codes(divided(blocks, step), is_negative).reshape(x.shape), scale


def divided(x: jax.Array, by: jax.Array | float) -> jax.Array:
    """x / by, rounded once.

    The compiler makes products with a reciprocal of divisions by a constant, a scalar or a row, and 28 % of their
    results are off by an ulp on a CPU; it does not see through the barrier that this divisor is one.
    """
    return x / jax.lax.optimization_barrier(jnp.broadcast_to(by, x.shape))


def quantized_activations(x: jax.Array, input_scale: jax.Array) -> jax.Array:
    """The values that an FP4 product sees in place of x, without ``input_scale``: that belongs in alpha.

    Args:
        x: bfloat16 or float32 [..., K].
        input_scale: as for ``activation_codes``.
    Returns:
        dtype of x [..., K], exact.
    """
    codes, scale = activation_codes(x, input_scale)
    size = (codes & 7).astype(jnp.float32)
    doubled = jnp.maximum(size, jnp.maximum(2 * size - 4, 4 * size - 16))  # 0 1 2 3 4 6 8 12
    numbers = jnp.where(codes > 7, -0.5, 0.5) * doubled
    values = numbers.reshape(*scale.shape, BLOCK) * scale.astype(jnp.float32)[..., None]
    return values.reshape(x.shape).astype(x.dtype)


def _nearest_codes(quotient: jax.Array, is_negative: jax.Array) -> jax.Array:
    """The code is how many midpoints are passed; onto 0.75, 1.75 and 3.5 counts, for the code above is even."""
    size = jnp.abs(quotient)
    # negated, so that a NaN has modelopt's code, 7
    count = sum((~(size <= bound)).astype(jnp.uint8) for bound in (0.25, 1.25, 2.5, 5.0))
    count = count + sum((~(size < bound)).astype(jnp.uint8) for bound in (0.75, 1.75, 3.5))
    return count + jnp.where(is_negative, jnp.uint8(8), jnp.uint8(0))
