"""The NVFP4 codec against the two libraries that write the format, bit for bit, and against its definition."""

import exporter_libs as libs
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders import nvfp4
from loaders.nvfp4 import (
    NVFP4Tensor,
    block_scales,
    decode,
    dequantize,
    encode,
    global_divisor,
    global_scale,
    pack,
    quantize,
    quantize_activations,
    unpack,
)

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
DTYPES = [np.float32, BF16, np.float16]
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
TIES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])


def same_bits(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.tobytes() == expected.tobytes()


def same(found, expected):
    for mine, theirs in zip((found.packed, found.block_scale, found.global_scale), expected, strict=True):
        same_bits(mine, theirs)


def weights(seed, dtype, spread, shape=(24, 160)):
    """Random rows of very different sizes, with all that is awkward: zero blocks, both zeros, the tiniest numbers."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape) * 0.02 * np.exp(spread * rng.standard_normal((*shape[:-1], 1)))
    w[0, :16], w[0, 16:32], w[1, :32] = 0.0, -0.0, np.where(np.arange(32) % 2, 0.0, -0.0)
    w[2, :8], w[2, 8:16] = -1e-30, 1e-30
    w[3, ::3] = 0
    w[4] = np.float64(ml_dtypes.finfo(dtype).smallest_subnormal) * rng.integers(-3, 4, shape[-1])
    w[5, ::2] = -np.abs(w[5, ::2]) * 1e-3
    w = w.clip(-6e4, 6e4).astype(dtype)
    if spread:
        w[6, :16] = np.abs(w).max()  # every element of a block is the largest
    return w


def test_codes_mean_what_the_format_says():
    assert decode(np.arange(8)).tolist() == VALUES.tolist()
    assert decode(np.arange(8, 16)).tolist() == (-VALUES).tolist()
    assert decode(np.arange(16)).dtype == np.float32
    assert np.signbit(decode(np.array([8])))


@pytest.mark.parametrize("sign", [1, -1])
def test_encode_takes_the_nearest_and_the_even_code_at_every_tie(sign):
    ties = TIES.astype(np.float32)
    assert (encode(sign * ties) & 7).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert (encode(sign * np.nextafter(ties, np.float32(0))) & 7).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert (encode(sign * np.nextafter(ties, np.float32(9))) & 7).tolist() == [1, 2, 3, 4, 5, 6, 7]
    every = np.arange(-7, 7, 2.0**-10, dtype=np.float32)
    away = np.abs(np.abs(every.astype(np.float64))[:, None] - VALUES)
    nearest = np.array([min(np.flatnonzero(row == row.min()), key=lambda code: code % 2) for row in away])
    np.testing.assert_array_equal(encode(every) & 7, nearest)


def test_encode_keeps_the_sign_of_what_is_less_than_zero_and_saturates():
    x = np.array([0.0, -0.0, 1e-45, -1e-45, -0.25, -0.2501, 6.01, -6.01, 3e38, -3e38, np.inf, -np.inf], np.float32)
    assert encode(x).tolist() == [0, 0, 0, 8, 8, 9, 7, 15, 7, 15, 7, 15]
    np.testing.assert_array_equal(encode(decode(np.arange(16))), [*range(8), 0, *range(9, 16)])


def test_encode_has_no_code_for_nan():
    with pytest.raises(ValueError, match="NaN"):
        encode(np.array([1.0, np.nan], np.float32))


def test_every_byte_unpacks_to_its_low_half_first_and_packs_again():
    every = np.arange(256, dtype=np.uint8)
    assert unpack(np.array([0x21, 0xF8], np.uint8)).tolist() == [1, 2, 8, 15]
    np.testing.assert_array_equal(unpack(every), np.stack([every % 16, every // 16], axis=1).reshape(-1))
    np.testing.assert_array_equal(pack(unpack(every.reshape(2, 4, 32))), every.reshape(2, 4, 32))
    with pytest.raises(ValueError, match="last axis is odd"):
        pack(np.zeros((2, 3), np.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("part", [None, 1.0, 0.37, 1e-4, 40.0])
def test_weights_have_the_bits_of_both_libraries(dtype, spread, part):
    """``part``: of its own amax is given; less than 1 drives block scales to 448, much more to their least."""
    w = weights(3, dtype, spread)
    most = float(ml_dtypes.finfo(dtype).max)
    amax = None if part is None else min(float(np.abs(w.astype(np.float64)).max() * part), most)
    same(quantize(w, amax=amax), libs.modelopt(w, amax))
    same(quantize(w, amax=amax, divide=True), libs.compressed_tensors(w, amax))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_random_weights_have_the_bits_of_both_libraries(dtype):
    for seed in range(20):
        w = (np.random.default_rng(seed).standard_normal((64, 512)) * 10.0 ** (seed % 5 - 3)).astype(dtype)
        same(quantize(w), libs.modelopt(w))
        same(quantize(w, divide=True), libs.compressed_tensors(w))


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("dtype", [BF16, np.float16])
def test_every_number_of_16_bits_has_the_bits_of_both_libraries(dtype, divide):
    bits = np.arange(1 << 16, dtype=np.uint16)
    is_finite = (bits & 0x7FFF) < np.array(np.inf, dtype).view(np.uint16)
    w = np.where(is_finite, bits, 0).astype(np.uint16).view(dtype).reshape(-1, 64)
    for scale in (1.0, 2.0**-20, 3e-5):
        amax = float(np.abs(w.astype(np.float64)).max()) * scale
        theirs = libs.compressed_tensors(w, amax) if divide else libs.modelopt(w, amax)
        same(quantize(w, amax=amax, divide=divide), theirs)


@pytest.mark.parametrize("scale", [1.0, 3.0e-5, 1.7e30, 2.0**-110])
def test_every_byte_with_every_block_scale_dequantises_to_the_bits_of_both_libraries(scale):
    block = np.arange(256, dtype=np.uint8).view(E4M3)
    block = np.tile(block[np.isfinite(block.astype(np.float32))], 2)[:, None].repeat(32, axis=1)
    packed = np.tile(np.arange(256, dtype=np.uint8), (len(block), 1))
    given = np.float32(scale)
    with np.errstate(over="ignore"):
        same_bits(dequantize(packed, block, given), libs.modelopt_dequantize(packed, block, given))
        found = dequantize(packed, block, np.array([given]), divide=True)
        same_bits(found, libs.compressed_tensors_dequantize(packed, block, np.array([given])))


def test_the_definition_by_hand():
    w = np.zeros((1, 32), np.float32)
    w[0, :4] = 2688, 448, -224, 112.5  # amax gives a global scale of 1 and block scales of 448 and 1
    w[0, 16:20] = 6, 5, -3.5, 0.25
    found = quantize(w)
    assert found.global_scale == 1
    assert found.block_scale.astype(np.float32).tolist() == [[448, 1]]
    assert unpack(found.packed)[0, [0, 1, 2, 3, 16, 17, 18, 19]].tolist() == [7, 2, 9, 1, 7, 6, 14, 0]
    assert found.packed[0, :2].tolist() == [0x27, 0x19]
    back = dequantize(found.packed, found.block_scale, found.global_scale)
    assert back[0, [0, 1, 2, 3, 16, 17, 18, 19]].tolist() == [2688, 448, -224, 224, 6, 4, -4, 0]
    assert quantize(w, divide=True).global_scale == np.float32(1) / np.float32(2688) * np.float32(2688)


def test_block_scales_stop_at_both_ends_and_have_a_value_for_zeros():
    w = np.ones((4, 16), np.float32)
    w[1:] *= np.array([[1e-9], [0], [7.2e-7]], np.float32)
    assert block_scales(w, np.float32(1e-9)).astype(np.float32)[:, 0].tolist() == [448, 0.1718750, 1, 120]
    assert block_scales(w, np.float32(1)).astype(np.float32)[:, 0].tolist() == [0.171875, 2**-9, 1, 2**-9]
    divided = block_scales(w, np.float32(1e9), divide=True).astype(np.float32)
    assert divided[:, 0].tolist() == [448, 0.171875, 0.125, 120]
    assert block_scales(w, np.float32(1), divide=True).astype(np.float32)[:, 0].tolist() == [
        0.171875,
        0.125,
        0.125,
        0.125,
    ]


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-43, -1e-42])
def test_zeros_and_what_has_no_scale_become_zeros(dtype, divide, value):
    """ModelOpt writes NaN scales here, so there are no bits to follow; compressed-tensors' are followed."""
    w = np.full((3, 32), value, dtype)
    found = quantize(w, divide=divide)
    if divide:
        same(found, libs.compressed_tensors(w))
    else:
        assert found.global_scale == 1
    assert (found.block_scale.astype(np.float32) > 0).all()
    assert (dequantize(found.packed, found.block_scale, found.global_scale, divide=divide) == 0).all() or divide


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("size", [1e-34, 1e-35, 1e-36, 1e-38, 1e-40])
def test_what_has_a_scale_below_the_least_normal_number_has_the_bits_of_modelopt(dtype, size):
    w = (np.random.default_rng(0).standard_normal((4, 64)) * size).astype(dtype)
    found = quantize(w)
    assert size > 1e-35 or 0 < found.global_scale < np.finfo(np.float32).tiny
    same(found, libs.modelopt(w))
    same(quantize(w, amax=2 * size), libs.modelopt(w, 2 * size))
    back = dequantize(found.packed, found.block_scale, found.global_scale)
    same_bits(back, libs.modelopt_dequantize(*libs.modelopt(w)))
    codes = quantize_activations(w, found.global_scale)[0]
    np.testing.assert_array_equal(codes, unpack(found.packed))


def test_modelopt_gives_no_usable_scale_for_a_zero_tensor():
    _, block, scale = libs.modelopt(np.zeros((2, 32), np.float32))
    assert scale == 0
    assert np.isnan(block.astype(np.float32)).all()


def test_divisor_is_rounded_to_the_weights_dtype_and_overflows_in_float16():
    amax = 0.0732421875  # representable in all three
    assert global_divisor(amax, BF16)[0] == 36608 != global_divisor(amax)[0]
    assert global_divisor(amax, BF16)[0] * global_scale(amax) != 1
    assert global_divisor(0.04, np.float16)[0] == 1
    assert global_divisor(0.042, np.float16)[0] > 60000
    assert global_divisor(0.0).tolist() == [1]
    assert global_scale(0.0).tolist() == 1


@pytest.mark.parametrize("divide", [False, True])
def test_each_part_of_a_stack_may_have_its_own_scale(divide):
    w = weights(5, BF16, 2.0, shape=(6 * 8, 96)).reshape(3, 2, 8, 96)
    amax = np.abs(w.astype(np.float32)).max(axis=(2, 3))
    found = quantize(w, amax=amax, divide=divide)
    assert found.global_scale.shape == (3, 2)
    for index in np.ndindex(3, 2):
        alone = quantize(w[index], divide=divide)
        same_bits(found.packed[index], alone.packed)
        same_bits(found.block_scale[index], alone.block_scale)
        assert found.global_scale[index] == alone.global_scale.item()
    expected = np.stack(
        [
            dequantize(found.packed[index], found.block_scale[index], found.global_scale[index], divide=divide)
            for index in np.ndindex(3, 2)
        ]
    ).reshape(w.shape)
    for shape in ((3, 2), (3, 2, 1), (3, 2, 1, 1)):
        scales = found.global_scale.reshape(shape)
        same_bits(dequantize(found.packed, found.block_scale, scales, divide=divide), expected)


def test_stacks_and_vectors_have_the_bits_of_modelopt():
    for shape in ((2, 3, 8, 48), (16,), (1, 16), (5, 7, 16)):
        w = np.random.default_rng(1).standard_normal(shape).astype(BF16)
        same(quantize(w), libs.modelopt(w))
    empty = quantize(np.zeros((0, 32), np.float32))
    assert (empty.packed.shape, empty.block_scale.shape) == ((0, 16), (0, 2))
    assert dequantize(empty.packed, empty.block_scale, empty.global_scale).shape == (0, 32)


@pytest.mark.parametrize("divide", [False, True])
def test_neither_threads_nor_the_size_of_a_chunk_nor_strides_change_a_bit(divide, monkeypatch):
    w = weights(9, BF16, 2.0, shape=(200, 176))
    expected = quantize(w, divide=divide)
    back = dequantize(expected.packed, expected.block_scale, expected.global_scale, divide=divide)
    same_bits(quantize(np.asfortranarray(w), divide=divide).packed, expected.packed)
    monkeypatch.setattr(nvfp4, "_CHUNK", 7)
    for threads in (1, 3):
        found = quantize(w, divide=divide, threads=threads)
        same(found, (expected.packed, expected.block_scale, expected.global_scale))
    same_bits(dequantize(expected.packed, expected.block_scale, expected.global_scale, divide=divide), back)
    same_bits(block_scales(w, expected.global_scale, divide=divide), expected.block_scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_have_the_bits_of_both_libraries(dtype):
    x = weights(11, dtype, 1.0) * dtype(50)
    amax = float(np.abs(x.astype(np.float32)).max())
    for part in (1.0, 0.5, 3.0):
        scale = global_scale(amax * part)
        codes, block = quantize_activations(x, scale)
        packed, expected, _ = libs.modelopt(x, scale=scale)
        same_bits(pack(codes), packed)
        same_bits(block, expected)
        divisor = global_divisor(amax * part, dtype)
        codes, block = quantize_activations(x, divisor, divide=True)
        back = dequantize(pack(codes), block, divisor, divide=True)
        same_bits(back.astype(dtype), libs.compressed_tensors_activations(x, divisor))


def test_the_two_conventions_differ_for_activations_of_16_bits():
    x = np.random.default_rng(0).standard_normal((256, 1024), np.float32)
    differing = {}
    for dtype in DTYPES:
        narrow = x.astype(dtype)
        scale = global_scale(np.abs(narrow.astype(np.float32)).max())
        _, block = quantize_activations(narrow, scale)
        _, divided = quantize_activations(narrow, 1 / scale, divide=True)
        differing[dtype] = float((block != divided).mean())
    assert differing[np.float32] < 1e-4
    assert 0.005 < differing[BF16] < 0.05
    assert 0 < differing[np.float16] < 0.01


@given(st.integers(0, 2**32 - 1), st.floats(-30, 30), st.booleans(), st.sampled_from(DTYPES[:2]))
def test_what_comes_back_is_within_half_a_step(seed, exponent, divide, dtype):
    w = (np.random.default_rng(seed).standard_normal((4, 64)) * np.exp(exponent)).astype(dtype)
    found = quantize(w, divide=divide)
    back = dequantize(found.packed, found.block_scale, found.global_scale, divide=divide)
    scale = found.block_scale.astype(np.float64)
    step = scale / found.global_scale if divide else scale * found.global_scale
    wide, step = w.astype(np.float64), np.repeat(step, 16, axis=1)
    half = np.select([np.abs(wide) <= 2 * step, np.abs(wide) <= 4 * step], [0.25 * step, 0.5 * step], step)
    # e4m3 rounds a block scale down by up to 1/16, and bfloat16 a divisor by 1/128: then the largest saturate
    assert (np.abs(back - wide) <= half * 1.001 + np.maximum(np.abs(wide) - 6 * step, 0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("amax", [None, 1.0])
def test_what_is_not_finite_is_refused(dtype, bad, amax):
    w = np.ones((4, 32), dtype)
    w[2, 17] = bad
    for call in (
        lambda: quantize(w, amax=amax),
        lambda: quantize(w, amax=amax, divide=True, threads=2),
        lambda: quantize_activations(w, 1.0),
        lambda: block_scales(w, 1.0),
    ):
        with pytest.raises(ValueError, match="NaN or infinity"):
            call()


def test_what_does_not_fit_is_refused():
    w = np.ones((4, 32), np.float32)
    one = quantize(w)
    cases = {
        "no multiple of 16": lambda: quantize(w[:, :24]),
        "float64 cannot be": lambda: quantize(w.astype(np.float64)),
        "uint8 cannot be": lambda: quantize(one.packed),
        r"shape \(\) cannot": lambda: quantize(np.float32(1).reshape(())),
        "amax is -1": lambda: quantize(w, amax=-1.0),
        "finite in float16": lambda: quantize(w.astype(np.float16), amax=7e4, divide=True),
        "amax is nan": lambda: quantize(w, amax=np.nan),
        "amax is inf": lambda: quantize(w, amax=np.inf, divide=True),
        r"shape \(2,\) for a tensor of shape \(4, 32\)": lambda: quantize(w, amax=np.ones(2)),
        r"shape \(4, 32\) for": lambda: quantize(w, amax=np.ones((4, 32))),
        "global scale is 0.0": lambda: quantize_activations(w, 0.0),
        "global scale is -1": lambda: block_scales(w, -1.0),
        "global scale is nan": lambda: quantize_activations(w, np.nan),
        "packed is int8": lambda: dequantize(one.packed.view(np.int8), one.block_scale, 1.0),
        "K a multiple of 16": lambda: dequantize(one.packed[:, :12], one.block_scale, 1.0),
        r"expected float8_e4m3fn \(4, 2\)": lambda: dequantize(one.packed, one.block_scale[:, :1], 1.0),
        "block_scale is uint8": lambda: dequantize(one.packed, one.block_scale.view(np.uint8), 1.0),
        r"shape \(3,\)": lambda: dequantize(one.packed, one.block_scale, np.ones(3)),
    }
    for match, call in cases.items():
        with pytest.raises(ValueError, match=match):
            call()
    assert isinstance(one, NVFP4Tensor)
