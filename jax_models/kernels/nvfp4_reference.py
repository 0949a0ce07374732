"""NVFP4 products in plain ``jax.numpy``: what the kernels of ``nvfp4.py`` compute, on any platform.

Letters of both files: a weight is [N, K], outputs by inputs; ``J`` = K/2 bytes of a row, ``Q`` = K/16 blocks of it,
``T`` or ``U`` rows of x, ``A`` rows in groups, ``E`` experts. Of ``matmul`` the global scale is the caller's: it
multiplies the result. Rows in groups are multiplied by alphas [E, H], for each of H equal parts of the outputs one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_models.kernels.grouped import ragged_matmul
from jax_models.kernels.grouped_on_cpu import grouped_on_cpu, one_of
from loaders.quantization.schemes import BLOCK


def dequantized(packed: jax.Array, scale: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Expand a weight, without its global scale.

    Args:
        packed: uint8 [..., N, K/2]; two e2m1 codes per byte, even element in the low bits.
        scale: float8_e4m3fn [..., N, K/16]; one per 16 elements along K.
        dtype: bfloat16 or wider: a product has 2 + 4 significant bits and is exact.

    Returns:
        dtype [..., N, K].

    Raises:
        ValueError: the shapes or dtypes are not those of one weight.
    """
    check_weight(packed, scale)
    *lead, J = packed.shape
    codes = jnp.stack((packed & 15, packed >> 4), axis=-1).reshape(*lead, -1, BLOCK)
    blocks = _e2m1(codes) * scale.astype(jnp.float32)[..., None]
    return blocks.reshape(*lead, 2 * J).astype(dtype)


def reference_matmul(x_TK: jax.Array, packed_NJ: jax.Array, scale_NQ: jax.Array) -> jax.Array:
    """x [T, K] times the transposed weight [N, K] -> float32 [T, N]."""
    check_rows(x_TK, packed_NJ)
    weight_NK = dequantized(packed_NJ, scale_NQ, x_TK.dtype)
    precision = _precision(x_TK)
    return jnp.einsum("tk,nk->tn", x_TK, weight_NK, precision=precision, preferred_element_type=jnp.float32)


def reference_grouped_matmul(
    x_UK: jax.Array,
    packed_ENJ: jax.Array,
    scale_ENQ: jax.Array,
    alphas_EH: jax.Array,
    sizes_E: jax.Array,
    row_A: jax.Array | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    by_tiles: bool = False,
) -> jax.Array:
    """Rows in ``sizes_E`` groups, each times its weight [N, K] and alpha -> [A, N]; the rest come out as anything.

    ``by_tiles``: expand weights that have rows, one after the other, as is best on a CPU; it has no derivative.
    """
    check_rows(x_UK, packed_ENJ)
    check_alphas(alphas_EH, packed_ENJ)
    rows_AK = x_UK if row_A is None else x_UK[row_A]

    def weight_of(group: jax.Array) -> jax.Array:
        return dequantized(one_of(packed_ENJ, group), one_of(scale_ENQ, group), jnp.float32)

    if by_tiles:
        found_AN = grouped_on_cpu(rows_AK, sizes_E, weight_of)
    else:
        weight_ENK = dequantized(packed_ENJ, scale_ENQ, x_UK.dtype)
        found_AN = ragged_matmul(rows_AK, weight_ENK, sizes_E, _precision(x_UK))
    A, N = found_AN.shape
    owner_A = jnp.repeat(jnp.arange(len(sizes_E)), sizes_E, total_repeat_length=A)
    alpha_AN = jnp.repeat(alphas_EH[owner_A], N // alphas_EH.shape[1], axis=1)
    return (found_AN * alpha_AN).astype(dtype)


def check_weight(packed: jax.Array, scale: jax.Array) -> None:
    """Raises ValueError unless the two arrays are one NVFP4 weight (or a stack of them)."""
    expected = (*packed.shape[:-1], packed.shape[-1] * 2 // BLOCK)
    if packed.dtype != jnp.uint8 or scale.dtype != jnp.float8_e4m3fn:
        raise ValueError(f"NVFP4 weight has dtypes {packed.dtype}, {scale.dtype}, expected uint8, float8_e4m3fn")
    if scale.shape != expected or packed.shape[-1] * 2 % BLOCK:
        raise ValueError(f"NVFP4 codes of shape {packed.shape} have scales of shape {scale.shape}, expected {expected}")


def check_rows(x: jax.Array, packed: jax.Array) -> None:
    """Raises ValueError unless x [T, K] can be multiplied by a weight of packed [..., N, K/2]."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x has dtype {x.dtype}, expected bfloat16 or float32")
    if x.shape[-1] != 2 * packed.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} columns, expected {2 * packed.shape[-1]}: two per byte of the weight")


def check_alphas(alphas: jax.Array, packed: jax.Array) -> None:
    """Raises ValueError unless alphas [E, H] scale H equal parts of the outputs of packed [E, N, K/2]."""
    if alphas.ndim != 2 or len(alphas) != len(packed) or packed.shape[1] % alphas.shape[1]:
        raise ValueError(f"alphas of shape {alphas.shape} do not belong to NVFP4 weights of shape {packed.shape}")


def _precision(x: jax.Array) -> jax.lax.Precision | None:
    """Whole products of float32. Those of bfloat16 are exact anyway, and TPU's ragged dot refuses to be asked."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _e2m1(codes: jax.Array) -> jax.Array:
    """Codes 0..15 as float32: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, by arithmetic (a gather is slow)."""
    magnitude = (codes & 7).astype(jnp.float32)
    doubled = jnp.maximum(magnitude, jnp.maximum(2 * magnitude - 4, 4 * magnitude - 16))  # 0 1 2 3 4 6 8 12: convex
    return jnp.where(codes > 7, -0.5, 0.5) * doubled
