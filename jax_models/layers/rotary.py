"""Rotary position embedding, rope types default, linear, dynamic and yarn.

Source: transformers ``modeling_rope_utils``; arXiv:2104.09864 (rotary), arXiv:2309.00071 (YaRN). The float32 steps are
the reference's: at position 40,000 one unit in the last place of a frequency is 1e-3 rad.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from loaders.config import RopeParameters


def rotary_embedding(
    rope: RopeParameters, rotary_dim: int, max_position_embeddings: int, position_ids: jax.Array, length_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position's angles.

    Args:
        rope: rotary parameters of the config.
        rotary_dim: dimensions of a head that turn, 2R.
        max_position_embeddings: of the config; where "dynamic" starts to scale.
        position_ids: int32 [B, T]; or [3, B, T], time, height and width, of which each pair turns by one.
        length_B: int32, tokens of each row's sequence; only "dynamic" looks at it.
    Returns:
        Two float32 [B, T, R].
    """
    if rope.is_dynamic:
        freq = _dynamic_frequencies(rope, rotary_dim, max_position_embeddings, length_B)[:, None, :]
        scale = 1.0
    else:
        frequencies, scale = _static_frequencies(rope, rotary_dim)
        freq = jnp.asarray(frequencies)[None, None, :]
    if position_ids.ndim == 3:
        positions = jnp.moveaxis(position_ids[_axes(rope, rotary_dim)], 0, -1)
    else:
        positions = position_ids[:, :, None]
    angles_BTR = positions.astype(jnp.float32) * freq
    return jnp.cos(angles_BTR) * scale, jnp.sin(angles_BTR) * scale


def rotate(x_BTNH: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Rotate the halves of each head's first 2R dimensions against each other, in float32; the rest stays."""
    turned, rest = jnp.split(x_BTNH, [2 * cos_BTR.shape[-1]], axis=-1)
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTR[:, :, None, :], sin_BTR[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def _axes(rope: RopeParameters, rotary_dim: int) -> np.ndarray:
    """Which of time, height and width turns each pair, int32 [R]: interleaved, the rest by time."""
    assert rope.mrope_section is not None
    _, height, width = rope.mrope_section
    pairs = range(rotary_dim // 2)
    axes = [1 if r % 3 == 1 and r < 3 * height else 2 if r % 3 == 2 and r < 3 * width else 0 for r in pairs]
    return np.array(axes, np.int32)


def _exponents(rotary_dim: int) -> np.ndarray:
    return np.arange(0, rotary_dim, 2).astype(np.float32) / np.float32(rotary_dim)


def _static_frequencies(rope: RopeParameters, rotary_dim: int) -> tuple[np.ndarray, float]:
    """Radians per position, float32 [R], and the factor on cos and sin."""
    # theta ** x rounded once to float32, then inverted in float32
    period = np.power(float(rope.rope_theta), _exponents(rotary_dim).astype(np.float64)).astype(np.float32)
    if rope.rope_type == "linear":
        assert rope.factor is not None
        return (np.float32(1) / period) / np.float32(rope.factor), 1.0
    if rope.rope_type == "yarn":
        return _yarn_frequencies(rope, rotary_dim, period)
    return np.float32(1) / period, 1.0


def _dynamic_frequencies(rope: RopeParameters, rotary_dim: int, longest: int, length_B: jax.Array) -> jax.Array:
    """Frequencies [B, R] whose base grows with the length beyond ``longest``."""
    assert rope.factor is not None
    length_B1 = jnp.maximum(length_B, longest).astype(jnp.float32)[:, None]
    stretch_B1 = rope.factor * length_B1 / longest - (rope.factor - 1)
    base_B1 = rope.rope_theta * stretch_B1 ** (rotary_dim / (rotary_dim - 2))
    return 1.0 / base_B1 ** jnp.asarray(_exponents(rotary_dim))[None, :]


def _yarn_frequencies(rope: RopeParameters, rotary_dim: int, period: np.ndarray) -> tuple[np.ndarray, float]:
    """Blend of interpolated and original frequencies, and the attention factor."""
    assert rope.factor is not None
    assert rope.original_max_position_embeddings is not None
    low, high = (
        _dimension_of(rotations, rotary_dim, rope.rope_theta, rope.original_max_position_embeddings)
        for rotations in (rope.beta_fast or 32, rope.beta_slow or 1)
    )
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(rotary_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    original = np.float32(1) / period
    interpolated = np.float32(1) / (np.float32(rope.factor) * period)
    keep = np.float32(1) - ramp
    return (interpolated * (np.float32(1) - keep) + original * keep).astype(np.float32), _yarn_attention_factor(rope)


def _dimension_of(rotations: float, rotary_dim: int, theta: float, length: int) -> float:
    """The pair of dimensions that turns ``rotations`` times over ``length`` positions."""
    return rotary_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def _yarn_attention_factor(rope: RopeParameters) -> float:
    assert rope.factor is not None
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
