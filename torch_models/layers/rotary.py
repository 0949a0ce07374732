"""Rotary position embedding, rope types default, linear, dynamic and yarn.

Source: transformers ``modeling_rope_utils``; arXiv:2104.09864 (rotary), arXiv:2309.00071 (YaRN). The float32 steps are
the reference's: at position 40,000 one unit in the last place of a frequency is 1e-3 rad.
"""

from __future__ import annotations

import functools
import math

import torch

from loaders.config import RopeParameters


def rotary_embedding(
    rope: RopeParameters,
    rotary_dim: int,
    max_position_embeddings: int,
    position_ids: torch.Tensor,
    length_B: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position's angles.

    Args:
        rope: rotary parameters of the config.
        rotary_dim: dimensions of a head that turn, 2R.
        max_position_embeddings: of the config; where "dynamic" starts to scale.
        position_ids: integers [B, T]; or [3, B, T], time, height and width, of which each pair turns by one.
        length_B: integers, tokens of each row's sequence; only "dynamic" looks at it.
    Returns:
        Two float32 [B, T, R].
    """
    if rope.is_dynamic:
        freq = _dynamic_frequencies(rope, rotary_dim, max_position_embeddings, length_B)[:, None, :]
        scale = 1.0
    else:
        frequencies, scale = _static_frequencies(rope, rotary_dim, position_ids.device)
        freq = frequencies[None, None, :]
    if position_ids.ndim == 3:
        axis_R = _axes(rope, rotary_dim, position_ids.device)
        positions = position_ids.index_select(0, axis_R).permute(1, 2, 0)
    else:
        positions = position_ids[:, :, None]
    angles_BTR = positions.float() * freq
    return torch.cos(angles_BTR) * scale, torch.sin(angles_BTR) * scale


def rotate(x_BTNH: torch.Tensor, cos_BTR: torch.Tensor, sin_BTR: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of each head's first 2R dimensions against each other, in float32; the rest stays."""
    size = 2 * cos_BTR.shape[-1]
    first, second = (x_BTNH if size == x_BTNH.shape[-1] else x_BTNH[..., :size]).float().chunk(2, dim=-1)
    cos, sin = cos_BTR.unsqueeze(2), sin_BTR.unsqueeze(2)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BTNH.dtype)
    return turned if size == x_BTNH.shape[-1] else torch.cat([turned, x_BTNH[..., size:]], dim=-1)


@functools.cache
@torch.inference_mode(False)
def _axes(rope: RopeParameters, rotary_dim: int, device: torch.device) -> torch.Tensor:
    """Which of time, height and width turns each pair, int64 [R]: interleaved, the rest by time."""
    assert rope.mrope_section is not None
    _, height, width = rope.mrope_section
    pairs = range(rotary_dim // 2)
    axes = [1 if r % 3 == 1 and r < 3 * height else 2 if r % 3 == 2 and r < 3 * width else 0 for r in pairs]
    return torch.tensor(axes, device=device)


def _exponents(rotary_dim: int) -> torch.Tensor:
    return torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim


@functools.cache
@torch.inference_mode(False)
def _exponents_on(rotary_dim: int, device: torch.device) -> torch.Tensor:
    return _exponents(rotary_dim).to(device)


@functools.cache  # a constant of the config, on each device once: a captured graph reads it where it is
@torch.inference_mode(False)
def _static_frequencies(rope: RopeParameters, rotary_dim: int, device: torch.device) -> tuple[torch.Tensor, float]:
    """Radians per position, float32 [R], and the factor on cos and sin. Computed on the CPU, wherever they go."""
    period = rope.rope_theta ** _exponents(rotary_dim)
    scale = 1.0
    if rope.rope_type == "yarn":
        frequencies, scale = _yarn_frequencies(rope, rotary_dim, period)
    elif rope.rope_type == "linear":
        assert rope.factor is not None
        frequencies = (1.0 / period) / rope.factor
    else:
        frequencies = 1.0 / period
    return frequencies.to(device), scale


def _dynamic_frequencies(rope: RopeParameters, rotary_dim: int, longest: int, length_B: torch.Tensor) -> torch.Tensor:
    """Frequencies [B, R] whose base grows with the length beyond ``longest``."""
    assert rope.factor is not None
    length_B1 = length_B.clamp(min=longest).float()[:, None]
    stretch_B1 = rope.factor * length_B1 / longest - (rope.factor - 1)
    base_B1 = rope.rope_theta * stretch_B1 ** (rotary_dim / (rotary_dim - 2))
    return 1.0 / base_B1 ** _exponents_on(rotary_dim, length_B.device)[None, :]


def _yarn_frequencies(rope: RopeParameters, rotary_dim: int, period: torch.Tensor) -> tuple[torch.Tensor, float]:
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
    pairs = torch.arange(rotary_dim // 2, dtype=torch.float32, device="cpu")
    ramp = ((pairs - low) / width).clamp(0, 1)
    original = 1.0 / period
    interpolated = 1.0 / (rope.factor * period)
    keep = 1 - ramp
    return interpolated * (1 - keep) + original * keep, _yarn_attention_factor(rope)


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
