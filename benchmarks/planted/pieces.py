"""What the text of planted bugs may call beside what the edited module has; ``t_`` is of torch, ``j_`` of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional as TF

__all__ = ["TF", "jax", "jnp", "np", "torch"]  # with all below


def t_scaled_head(x, head, factor):
    x = x.clone()
    x[:, :, head] = x[:, :, head] * factor
    return x


def t_scaled_chan(x, channel, factor):
    x = x.clone()
    x[..., channel] = x[..., channel] * factor
    return x


def t_norm(norm, x, eps):
    """A norm with another eps."""
    norm.eps, kept = eps, norm.eps
    try:
        return norm.forward(x)
    finally:
        norm.eps = kept


def j_norm(norm, x, eps):
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return norm.weight[...].astype(x.dtype) * normed.astype(x.dtype)


def t_pairs(x, cos, sin):
    """Rotation of even against odd dimensions."""
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    c, s = cos[:, :, None], sin[:, :, None]
    return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2).to(x.dtype)


def t_tile(q_BTNH, groups):
    """Query heads in the order in which tiled key heads would serve them."""
    return q_BTNH.unflatten(2, (-1, groups)).transpose(2, 3).flatten(2, 3)


def j_tile(q_BTNH, groups):
    B, T, N, H = q_BTNH.shape
    return jnp.swapaxes(q_BTNH.reshape(B, T, N // groups, groups, H), 2, 3).reshape(B, T, N, H)


def t_narrow(visible_BTS):
    """One key fewer at the far edge of a window of 24."""
    _, T, S = visible_BTS.shape
    return visible_BTS & ~(torch.arange(S)[None] == torch.arange(T)[:, None] - 23)[None]


def t_swap(experts, a, b):
    return torch.where(experts == a, b, torch.where(experts == b, a, experts))


def t_bf16(x):
    return x.bfloat16().to(x.dtype)


def j_bf16(x):
    return jax.lax.reduce_precision(x, 8, 7)


def truncated(array):
    """float32 cut to bfloat16's bits."""
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def put(array, index, value):
    array[index] = value
    return array
