"""NVFP4 products, the TPU kernels (interpreted) and their references, against float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from shape_suffixes import checked_shape_suffixes

from jax_models.kernels import nvfp4

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FINITE = np.arange(0x7F, dtype=np.uint8)  # e4m3 without a sign: 0, subnormals from 2^-9, up to 448; 0x7F is NaN
SHAPES = [
    (1, 1, 16),
    (3, 40, 48),
    (8, 128, 64),
    (17, 384, 256),
    (130, 40, 1040),
    (8, 384, 1040),
    (1, 128, 48),
    (3, 1, 256),
    (17, 128, 2576),  # of a row 1288 bytes: a block of 1024, and one that reaches beyond its end
    (300, 600, 64),  # more than one block of outputs, the last beyond the end, and rows in units of 128
]
GROUPS = {
    "with empty ones": ([3, 0, 5, 0, 0, 9], 17),
    "one giant": ([0, 150, 0], 150),
    "rows behind the last": ([2, 0, 4], 20),
    "one group": ([7], 7),
    "no rows in any": ([0, 0], 5),
    "groups that share tiles": ([100, 1, 130, 27], 258),
}
DTYPES = ["bfloat16", "float32"]


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def weight(rng, *shape):
    """Random bytes, every finite scale equally often, and what they mean as float64 (exactly)."""
    *lead, N, K = shape
    packed = rng.integers(0, 256, (*lead, N, K // 2), np.uint8)
    scale = rng.choice(FINITE, (*lead, N, K // 16)).view(ml_dtypes.float8_e4m3fn)
    codes = np.stack((packed & 15, packed >> 4), axis=-1).reshape(shape)
    return packed, scale, E2M1[codes] * np.repeat(scale.astype(np.float64), 16, axis=-1)


def rows(rng, dtype, *shape):
    x = jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
    return x, np.asarray(x, np.float64)


def assert_sums(found, x, w):
    """As near as sums of K exact products in float32: rounding walks sqrt(K) steps of 2^-24 of all magnitudes."""
    assert found.dtype == jnp.float32
    assert found.shape == (len(x), len(w))
    steps = 16 + np.sqrt(x.shape[1])
    error = np.abs(np.asarray(found, np.float64) - x @ w.T)
    np.testing.assert_array_less(error, steps * 2.0**-24 * (np.abs(x) @ np.abs(w).T) + 1e-300)


def alphas_of(sizes, parts=1):
    """Powers of two: what they multiply stays as exact as it was."""
    return 2.0 ** (np.arange(len(sizes) * parts, dtype=np.float32).reshape(len(sizes), parts) % 7 - 3)


def groups_of(sizes):
    ends = np.cumsum(sizes)
    return list(zip(ends - sizes, ends, strict=True))


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_every_code_and_every_scale_is_expanded_exactly():
    codes = np.arange(256, dtype=np.uint8)
    packed = np.tile(codes, (127, 1))  # 32 blocks to a row
    scale = np.repeat(FINITE[:, None], 32, axis=1).view(ml_dtypes.float8_e4m3fn)
    nibbles = np.stack((codes & 15, codes >> 4), axis=-1).reshape(-1)
    expected = E2M1[nibbles] * scale.astype(np.float64)[:, :1]
    for dtype in DTYPES:
        found = nvfp4.dequantized(jnp.asarray(packed), jnp.asarray(scale), dtype)
        np.testing.assert_array_equal(np.asarray(found, np.float64), expected)
        identity = jnp.eye(512, dtype=dtype)
        found = nvfp4.matmul(identity, jnp.asarray(packed), jnp.asarray(scale), interpret=True)
        np.testing.assert_array_equal(np.asarray(found, np.float64).T, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.slow_unless("*-float32", "(3, 40, 48)-bfloat16")
def test_a_product_is_a_float32_sum_of_exact_products(rng, shape, dtype):
    T, N, K = shape
    packed, scale, w = weight(rng, N, K)
    x, x64 = rows(rng, dtype, T, K)
    with checked_shape_suffixes("jax_models"):
        assert_sums(nvfp4.matmul(x, packed, scale, interpret=True), x64, w)
        assert_sums(jax.jit(nvfp4.nvfp4_matmul)(x, packed, scale), x64, w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.slow_unless("*-float32", "with empty ones-bfloat16")
def test_every_group_meets_its_own_weight(rng, case, dtype):
    (sizes, A), (N, K) = GROUPS[case], (384, 256) if case == "groups that share tiles" else (40, 48)
    packed, scale, w = weight(rng, len(sizes), N, K)
    x, x64 = rows(rng, dtype, A, K)
    given = (x, packed, scale, alphas_of(sizes, 2), jnp.asarray(sizes, jnp.int32))
    with checked_shape_suffixes("jax_models"):
        kernel = nvfp4.grouped_matmul(*given, interpret=True)
        reference = jax.jit(nvfp4.nvfp4_grouped_matmul)(*given)
    weighed = w * np.repeat(alphas_of(sizes, 2).astype(np.float64), N // 2, axis=1)[..., None]
    for found in (kernel, reference):
        assert found.shape == (A, N)
        for expert, (start, end) in enumerate(groups_of(sizes)):
            assert_sums(found[start:end], x64[start:end], weighed[expert])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_x_are_taken_in_the_order_of_groups(rng, dtype):
    """Each of 7 rows goes to several groups; 1040 columns, whose last block of bytes reaches beyond a row's end."""
    sizes, row_A = jnp.asarray([6, 0, 9], jnp.int32), jnp.asarray(rng.integers(0, 7, 20), jnp.int32)
    packed, scale, _ = weight(rng, 3, 40, 2576)
    x, _ = rows(rng, dtype, 7, 2576)
    rest = (packed, scale, alphas_of(sizes, 2), sizes)
    for product in (partial(nvfp4.grouped_matmul, interpret=True), nvfp4.nvfp4_grouped_matmul):
        found, expected = product(x, *rest, row_A), product(x[row_A], *rest)
        np.testing.assert_array_equal(found[:15], expected[:15])
        assert found.shape == (20, 40)


def test_a_result_is_rounded_once_where_it_is_stored(rng):
    """After alpha, which is no power of two here, in tiles that groups share."""
    sizes, A = GROUPS["groups that share tiles"]
    packed, scale, _ = weight(rng, len(sizes), 600, 64)
    x, _ = rows(rng, "bfloat16", A, 64)
    alphas = rng.uniform(0.5, 2.0, (len(sizes), 2)).astype(np.float32)
    given = (x, packed, scale, alphas, jnp.asarray(sizes, jnp.int32))
    for product in (partial(nvfp4.grouped_matmul, interpret=True), nvfp4.nvfp4_grouped_matmul):
        found = product(*given, dtype=jnp.bfloat16)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, product(*given).astype(jnp.bfloat16))


def test_a_group_without_rows_is_never_read(rng):
    packed, scale, w = weight(rng, 3, 40, 48)
    scale[1] = np.nan
    x, x64 = rows(rng, "bfloat16", 6, 48)
    sizes, ones = jnp.array([2, 0, 4], jnp.int32), np.ones((3, 1), np.float32)
    found = nvfp4.grouped_matmul(x, packed, scale, ones, sizes, interpret=True)
    assert_sums(found[:2], x64[:2], w[0])
    assert_sums(found[2:], x64[2:], w[2])


@pytest.mark.parametrize("size", [2.0**-100, 2.0**100])
def test_very_small_and_very_large_rows_keep_their_precision(rng, size):
    packed, scale, w = weight(rng, 40, 48)
    x, x64 = rows(rng, "bfloat16", 3, 48)
    assert_sums(nvfp4.matmul(x * jnp.bfloat16(size), packed, scale, interpret=True), x64 * size, w)


def test_what_does_not_belong_together_is_refused(rng):
    packed, scale, _ = weight(rng, 40, 48)
    x, _ = rows(rng, "bfloat16", 3, 48)
    for function in (nvfp4.nvfp4_matmul, nvfp4.reference_matmul):
        with pytest.raises(ValueError, match=r"scales of shape \(40, 2\), expected \(40, 3\)"):
            function(x, packed, scale[:, :2])
        with pytest.raises(ValueError, match="32 columns, expected 48"):
            function(x[:, :32], packed, scale)
        with pytest.raises(ValueError, match="dtypes int8"):
            function(x, packed.view(np.int8), scale)
        with pytest.raises(ValueError, match="x has dtype int32"):
            function(x.astype(jnp.int32), packed, scale)
    ones, sizes = np.ones((2, 3), np.float32), jnp.array([1, 2], jnp.int32)
    for function in (nvfp4.nvfp4_grouped_matmul, nvfp4.grouped_matmul):
        with pytest.raises(ValueError, match=r"alphas of shape \(2, 3\) do not belong to .* of shape \(2, 40, 24\)"):
            function(x, np.stack([packed] * 2), np.stack([scale] * 2), ones, sizes)
