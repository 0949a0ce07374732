"""Rotary embedding of the oracle, in float64: exact frequencies for every rope type the loaders accept.

R is the number of rotated pairs, half of the dimensions that turn. Source: arXiv:2104.09864 (RoPE), arXiv:2309.00071
(YaRN) and the meaning transformers ``modeling_rope_utils`` (5.23) gives to each key; checked against it in
tests/parity/test_oracle.py.
"""

from __future__ import annotations

import math

import numpy as np

from loaders.config import RopeParameters


def rotation(
    rope: RopeParameters, rotary_dim: int, trained: int, positions: np.ndarray, shake: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine by which ``rotate`` turns queries and keys.

    Args:
        rope: the rotary parameters.
        rotary_dim: dimensions of a head that turn, 2R.
        trained: max_position_embeddings.
        positions: integers [B, T]; or [3, B, T], time, height and width, of which every pair turns by one. Dynamic
            scaling looks at the largest of the whole batch, padding included.
        shake: a relative random error on every angle whose frequency is no power of two: those are exact in binary.

    Returns:
        Two float64 [B, T, R], already multiplied by YaRN's attention factor.
    """
    frequencies_R, scale = _frequencies(rope, rotary_dim, trained, int(positions.max(initial=0)) + 1)
    if positions.ndim == 3:
        of_pairs = np.moveaxis(positions[_axis_of_pairs(rope, rotary_dim // 2)], 0, -1)
    else:
        of_pairs = positions[..., None]
    angles_BTR = of_pairs * frequencies_R
    if shake:
        errors_BTR = np.random.default_rng(0).standard_normal(angles_BTR.shape) * (np.frexp(frequencies_R)[0] != 0.5)
        angles_BTR = angles_BTR * (1 + shake * errors_BTR)
    return scale * np.cos(angles_BTR), scale * np.sin(angles_BTR)


def rotate(x_BTNH: np.ndarray, cos_BTR: np.ndarray, sin_BTR: np.ndarray) -> np.ndarray:
    """Turn each pair (i, i + R) of every head by its angle and leave the rest; float64 [B, T, N, H] in and out."""
    cos_BT1R, sin_BT1R = cos_BTR[:, :, None], sin_BTR[:, :, None]
    R = cos_BTR.shape[-1]
    a_BTNR, b_BTNR, still = np.split(x_BTNH, [R, 2 * R], axis=-1)
    turned = a_BTNR * cos_BT1R - b_BTNR * sin_BT1R, b_BTNR * cos_BT1R + a_BTNR * sin_BT1R
    return np.concatenate([*turned, still], axis=-1)


def _axis_of_pairs(rope: RopeParameters, pairs: int) -> list[int]:
    """0, 1 or 2 for each pair: interleaved T H W T H W ..., height and width ending after as many as their sections."""
    assert rope.mrope_section is not None, f"{rope=}"
    return [pair % 3 if pair % 3 and pair < 3 * rope.mrope_section[pair % 3] else 0 for pair in range(pairs)]


def _frequencies(rope: RopeParameters, head_dim: int, trained: int, length: int) -> tuple[np.ndarray, float]:
    """Radians per position [R] and the factor on cosine and sine, for a batch whose last position is length - 1."""
    match rope.rope_type:
        case "default":
            return _powers(rope.rope_theta, head_dim), 1.0
        case "linear":
            return _powers(rope.rope_theta, head_dim) / _factor(rope), 1.0
        case "dynamic":
            # NTK: the base grows with the excess over the trained length; up to that length nothing changes
            growth = _factor(rope) * max(length, trained) / trained - (_factor(rope) - 1)
            return _powers(rope.rope_theta * growth ** (head_dim / (head_dim - 2)), head_dim), 1.0
        case "yarn":
            return _yarn(rope, head_dim), _yarn_scale(rope)
    raise ValueError(f"rope_type {rope.rope_type!r} is not implemented by the oracle")


def _powers(theta: float, head_dim: int) -> np.ndarray:
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _factor(rope: RopeParameters) -> float:
    assert rope.factor is not None, f"{rope=}"  # the loaders refuse such a config
    return rope.factor


def _yarn(rope: RopeParameters, head_dim: int) -> np.ndarray:
    """Fast pairs keep their frequency, slow ones are stretched by ``factor``, between them runs a linear ramp."""
    assert rope.original_max_position_embeddings is not None, f"{rope=}"
    trained = rope.original_max_position_embeddings

    def pair_turning(turns: float) -> float:
        """Which (fractional) pair makes ``turns`` full turns within the trained length."""
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    # 0 means "not given" to transformers as null does, here and for the two mscales
    first, last = pair_turning(rope.beta_fast or 32.0), pair_turning(rope.beta_slow or 1.0)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    # the upper bound is H - 1 although there are only R pairs: transformers' choice, and with small heads it shows
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    stretched_R = np.clip((np.arange(head_dim // 2) - first) / width, 0.0, 1.0)
    return _powers(rope.rope_theta, head_dim) * (1.0 - stretched_R + stretched_R / _factor(rope))


def _yarn_scale(rope: RopeParameters) -> float:
    """What YaRN multiplies cosine and sine by, queries and keys alike, so scores by its square."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    growth = 0.1 * math.log(max(_factor(rope), 1.0))
    if rope.mscale and rope.mscale_all_dim:
        return (rope.mscale * growth + 1.0) / (rope.mscale_all_dim * growth + 1.0)
    return growth + 1.0
