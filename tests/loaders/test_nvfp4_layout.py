"""Layouts of NVFP4 for kernels: index formulas, written out, and their inverses."""

import ml_dtypes
import numpy as np
import pytest

from loaders.quantization.nvfp4_layout import (
    padded,
    shuffle_gated_rows,
    shuffle_rows,
    swizzle,
    unshuffle_gated_rows,
    unshuffle_rows,
    unswizzle,
)

SHAPES = [(128, 4), (1, 1), (127, 3), (129, 5), (256, 8), (300, 18), (3, 200, 7), (2, 2, 130, 4)]


def numbered(shape):
    """No byte is zero, so that what is filled in is seen; neighbours differ."""
    return (np.arange(np.prod(shape)) % 251 + 1).astype(np.uint8).reshape(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_scale_goes_where_the_formula_says_and_the_rest_is_zero(shape):
    scale = numbered(shape)
    found = swizzle(scale)
    *leading, M, Kb = shape
    Mp, Kp = -(-M // 128) * 128, -(-Kb // 4) * 4
    assert found.shape == (*leading, Mp, Kp)
    for index in np.ndindex(*leading):
        flat, expected = found[index].reshape(-1), np.zeros(Mp * Kp, np.uint8)
        for m in range(M):
            for k in range(Kb):
                at = (m // 128) * (Kp // 4) * 512 + (k // 4) * 512 + (m % 32) * 16 + ((m % 128) // 32) * 4 + k % 4
                expected[at] = scale[index][m, k]
        np.testing.assert_array_equal(flat, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_unswizzle_brings_every_scale_back(shape):
    scale = numbered(shape)
    np.testing.assert_array_equal(unswizzle(swizzle(scale), shape), scale)
    e4m3 = (scale % 127).view(ml_dtypes.float8_e4m3fn)
    assert swizzle(e4m3).dtype == e4m3.dtype
    assert unswizzle(swizzle(e4m3), shape).tobytes() == e4m3.tobytes()


def test_swizzle_agrees_with_the_view_and_transpose_that_kernels_document():
    import torch

    scale = np.random.default_rng(0).integers(0, 255, (256, 12), np.uint8)
    tiles = torch.from_numpy(scale).view(2, 4, 32, 3, 4).permute(0, 3, 2, 1, 4)
    np.testing.assert_array_equal(swizzle(scale), tiles.reshape(256, 12).numpy())


def test_swizzling_twice_is_not_the_original_but_eight_times_is():
    scale = np.random.default_rng(0).integers(0, 255, (256, 8), np.uint8)
    found, orders = scale, []
    for times in range(1, 9):
        found = swizzle(found)
        if (found == scale).all():
            orders.append(times)
    assert orders == [8]


def test_sizes_are_rounded_up():
    assert [padded(*size) for size in ((1, 1), (128, 4), (129, 4), (128, 5))] == [
        (128, 4),
        (128, 4),
        (256, 4),
        (128, 8),
    ]


def test_rows_are_shuffled_within_groups_of_32():
    rows = np.arange(256)[:, None]
    found = shuffle_rows(rows)[:, 0]
    assert found[:10].tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 1, 5]
    assert found[32:36].tolist() == [32, 36, 40, 44]
    for r in range(256):
        assert found[r] == 32 * (r // 32) + 4 * ((r % 32) % 8) + (r % 32) // 8
    assert (shuffle_rows(shuffle_rows(rows)) != rows).any()


def test_gated_rows_take_turns_before_they_are_shuffled():
    rows = np.arange(256)[:, None]
    found = shuffle_gated_rows(rows)[:, 0]
    turns = np.stack([np.arange(128), np.arange(128, 256)], axis=1).reshape(-1)
    np.testing.assert_array_equal(found, shuffle_rows(turns[:, None])[:, 0])
    assert found[:4].tolist() == [0, 2, 4, 6]
    assert found[8:12].tolist() == [128, 130, 132, 134]


@pytest.mark.parametrize(
    ("there", "back"), [(shuffle_rows, unshuffle_rows), (shuffle_gated_rows, unshuffle_gated_rows)]
)
def test_shuffles_are_undone(there, back):
    rows = np.random.default_rng(0).integers(0, 255, (3, 384, 20), np.uint8)
    np.testing.assert_array_equal(back(there(rows)), rows)
    np.testing.assert_array_equal(there(back(rows)), rows)
    assert (there(rows) != rows).any()


def test_what_cannot_be_laid_out_is_refused():
    with pytest.raises(ValueError, match=r"shape \(128, 4\), expected \(256, 4\)"):
        unswizzle(np.zeros((128, 4), np.uint8), (129, 4))
    for call in (shuffle_rows, unshuffle_rows, shuffle_gated_rows, unshuffle_gated_rows):
        with pytest.raises(ValueError, match="64 rows cannot be shuffled, expected a multiple of 128"):
            call(np.zeros((64, 4), np.uint8))
