"""Frames of different sizes lie side by side, and attention over large ones keeps to a bound of memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_models.frames import framed, side_by_side
from jax_models.layers.vision import NO_FRAME, frame_attention
from loaders import open_checkpoint
from loaders.host.vision_grid import Grid, patches_of
from parity.zoo import make_checkpoint


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return open_checkpoint(make_checkpoint("qwen3_vl", tmp_path_factory.mktemp("a") / "a")).config.vision


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(0, 9))
def test_every_frame_has_a_place_of_its_own(lengths, extra):
    room = max(lengths) + extra
    row, start = side_by_side(lengths, room)
    taken = np.zeros((row.max() + 1, room), int)
    for one, length in enumerate(lengths):
        assert start[one] + length <= room
        taken[row[one], start[one] : start[one] + length] += 1
    assert taken.max() == 1
    assert taken.any(axis=1).all()
    assert len(taken) <= 1 + 2 * sum(lengths) // room  # of two neighbours one is half full


# patches of one picture of 64 by 64 are 4096
CROWDS = {
    "one": ([(1, 64, 64)], (1, 4096)),
    "a little more": ([(1, 66, 64)], (1, 6144)),
    "among thumbnails": ([(1, 64, 64), *[(1, 2, 2)] * 16], (2, 4096)),
    "beside a video of 64 frames": ([(1, 64, 64), (64, 2, 2)], (2, 4096)),
    "thumbnails first": ([*[(1, 2, 2)] * 16, (1, 64, 64)], (2, 4096)),
    "a video": ([(5, 8, 12)], (6, 96)),
}


@pytest.mark.parametrize("name", CROWDS)
def test_what_is_small_costs_its_own_room(config, name):
    grids, size = CROWDS[name]
    grids = [Grid(*grid) for grid in grids]
    count = sum(grid.patches for grid in grids)
    pixels_AX = np.random.default_rng(0).normal(size=(count, config.patch_numbers)).astype(np.float32)
    shown, token_U = framed(config, patches_of(config, pixels_AX, grids))
    frame_IP = np.asarray(shown.frame_IP)
    assert frame_IP.shape == size
    place_A = (token_U[:, None] * config.merged + np.arange(config.merged)).reshape(-1)
    np.testing.assert_array_equal(np.asarray(shown.pixels_IPX).reshape(-1, config.patch_numbers)[place_A], pixels_AX)
    frames = [grid.height * grid.width for grid in grids for _ in range(grid.time)]
    np.testing.assert_array_equal(frame_IP.reshape(-1)[place_A], np.repeat(np.arange(len(frames)), frames))
    assert (frame_IP == NO_FRAME).sum() == frame_IP.size - count


def attention_inputs(rows=3, P=96, N=2, H=8):
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(rows, P, N, H)), jnp.float32) for _ in range(3))
    frame_IP = (
        np.sort(rng.integers(0, 4, (rows, P)), axis=1).astype(np.int32) + 4 * np.arange(rows, dtype=np.int32)[:, None]
    )
    frame_IP[:, -7:] = NO_FRAME
    return q, k, v, jnp.asarray(frame_IP)


@pytest.mark.parametrize("most_scores", [2 * 3 * 96, 2 * 48 * 96, 2 * 96 * 96, 2 * 2 * 96 * 96])
def test_attention_in_parts_is_attention_frame_by_frame(most_scores):
    q, k, v, frame_IP = attention_inputs()
    found = np.asarray(frame_attention(q, k, v, frame_IP, most_scores=most_scores))
    for frame in range(12):
        row, here = frame // 4, np.asarray(frame_IP)[frame // 4] == frame
        one = jax.nn.dot_product_attention(*(array[row, here][None] for array in (q, k, v)))
        np.testing.assert_allclose(found[row, here], np.asarray(one)[0], atol=2e-6)
    grads = [
        jax.grad(lambda q, most=most: frame_attention(q, k, v, frame_IP, most_scores=most)[:, :-7].sum())(q)
        for most in (most_scores, 10**9)
    ]
    np.testing.assert_allclose(*grads, atol=2e-6)


def test_a_large_picture_is_attended_to_in_bounded_memory():
    shape = jax.ShapeDtypeStruct((1, 8192, 2, 8), jnp.float32)
    frame = jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    limit = 1 << 22
    bounded = jax.jit(lambda *given: frame_attention(*given, most_scores=limit))
    memory = bounded.lower(shape, shape, shape, frame).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * limit * 4  # scores, their exponents, the mask; at once they are 512 MiB
