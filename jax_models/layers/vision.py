"""The vision tower: patches of images and videos to tokens of the text model.

Source: transformers ``Qwen3VLVisionModel``, ``Qwen3_5VisionModel``. Letters beyond the usual: docs/glossary.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_models.layers.linear import Embedding, Linear
from jax_models.layers.mlp import ACTIVATIONS, gelu
from jax_models.layers.norm import LayerNorm
from jax_models.layers.rotary import rotate
from loaders.vision import VisionConfig

NO_FRAME = -1
MOST_SCORES = 1 << 26  # held at once: 256 MiB in float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shown:
    """Patches in rows of one length, a frame's own always side by side; see ``jax_models.frames``.

    Attributes:
        pixels_IPX: float32, the numbers of each patch.
        place_IP2: int32, row and column of each in its image.
        tap_IP4: int32, the four entries of the learned position grid around each.
        share_IP4: float32, what each of the four counts.
        frame_IP: int32, which frame each is of: patches see those of their own. ``NO_FRAME`` for padding.
    """

    pixels_IPX: jax.Array
    place_IP2: jax.Array
    tap_IP4: jax.Array
    share_IP4: jax.Array
    frame_IP: jax.Array


class PatchProjection(nnx.Module):
    """A convolution whose window is a whole patch: a product. Weight [C, channels, frames, rows, columns]."""

    def __init__(self, config: VisionConfig) -> None:
        size = config.patch_size
        shape = (config.hidden_size, config.in_channels, config.temporal_patch_size, size, size)
        self.weight = nnx.Param(jnp.zeros(shape))
        self.bias = nnx.Param(jnp.zeros((config.hidden_size,)))

    def __call__(self, x_IPX: jax.Array) -> jax.Array:
        weight_CX = self.weight[...].reshape(self.weight.shape[0], -1).astype(x_IPX.dtype)
        y_IPC = jnp.einsum("ipx,cx->ipc", x_IPX, weight_CX, preferred_element_type=jnp.float32)
        return (y_IPC + self.bias[...].astype(x_IPX.dtype).astype(jnp.float32)).astype(x_IPX.dtype)


class PatchEmbed(nnx.Module):
    """Patches to vectors."""

    def __init__(self, config: VisionConfig) -> None:
        self.proj = PatchProjection(config)

    def __call__(self, x_IPX: jax.Array) -> jax.Array:
        return self.proj(x_IPX)


class VisionAttention(nnx.Module):
    """Every patch of a frame sees all of it."""

    def __init__(self, config: VisionConfig) -> None:
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.proj = Linear(config.hidden_size, config.hidden_size, bias=True)
        self.num_heads = config.num_heads

    def __call__(self, x_IPC: jax.Array, cos_IPR: jax.Array, sin_IPR: jax.Array, frame_IP: jax.Array) -> jax.Array:
        qkv = self.qkv(x_IPC).reshape(*x_IPC.shape[:2], 3, self.num_heads, -1)
        q_IPNH, k_IPNH, v_IPNH = (qkv[:, :, part] for part in range(3))
        q_IPNH, k_IPNH = rotate(q_IPNH, cos_IPR, sin_IPR), rotate(k_IPNH, cos_IPR, sin_IPR)
        out_IPNH = frame_attention(q_IPNH, k_IPNH, v_IPNH, frame_IP)
        return self.proj(out_IPNH.reshape(x_IPC.shape))


class VisionMLP(nnx.Module):
    """linear_fc2(activation(linear_fc1(x)))."""

    def __init__(self, config: VisionConfig) -> None:
        self.linear_fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.linear_fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x_IPC: jax.Array) -> jax.Array:
        return self.linear_fc2(self.activation(self.linear_fc1(x_IPC)))


class VisionBlock(nnx.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, config: VisionConfig) -> None:
        self.norm1 = LayerNorm(config.hidden_size)
        self.norm2 = LayerNorm(config.hidden_size)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def __call__(self, x_IPC: jax.Array, cos_IPR: jax.Array, sin_IPR: jax.Array, frame_IP: jax.Array) -> jax.Array:
        x_IPC = x_IPC + self.attn(self.norm1(x_IPC), cos_IPR, sin_IPR, frame_IP)
        return x_IPC + self.mlp(self.norm2(x_IPC))


class PatchMerger(nnx.Module):
    """The patches of one token side by side, then two layers with the exact GELU between.

    ``norms_merged``: the norm is over all patches of a token (deepstack), not over each.
    """

    def __init__(self, config: VisionConfig, *, norms_merged: bool) -> None:
        merged = config.hidden_size * config.merged
        self.norm = LayerNorm(merged if norms_merged else config.hidden_size)
        self.linear_fc1 = Linear(merged, merged, bias=True)
        self.linear_fc2 = Linear(merged, config.out_hidden_size, bias=True)
        self.merged, self.norms_merged = merged, norms_merged

    def __call__(self, x_IPC: jax.Array) -> jax.Array:
        """Tokens, [I, U, D]."""
        if not self.norms_merged:
            x_IPC = self.norm(x_IPC)
        x_IUM = x_IPC.reshape(len(x_IPC), -1, self.merged)
        if self.norms_merged:
            x_IUM = self.norm(x_IUM)
        return self.linear_fc2(gelu(self.linear_fc1(x_IUM)))


class VisionTower(nnx.Module):
    """Patch embedding, learned and rotary positions, blocks, mergers."""

    def __init__(self, config: VisionConfig) -> None:
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nnx.Dict({str(block): VisionBlock(config) for block in range(config.depth)})
        self.merger = PatchMerger(config, norms_merged=False)
        if config.deepstack_visual_indexes:
            levels = range(len(config.deepstack_visual_indexes))
            self.deepstack_merger_list = nnx.Dict(
                {str(level): PatchMerger(config, norms_merged=True) for level in levels}
            )
        self.config = config

    def __call__(self, shown: Shown, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
        """Tokens that stand for the patches, [U, D] in ``dtype``, and those of every deepstack level; U counts padding.

        Args:
            shown: the patches.
            dtype: what is computed in.
        """
        x_IPC = self.patch_embed(shown.pixels_IPX.astype(dtype))
        learned_IPC = jnp.sum(self.pos_embed(shown.tap_IP4, jnp.float32) * shown.share_IP4[..., None], axis=2)
        x_IPC = x_IPC + learned_IPC.astype(dtype)
        cos_IPR, sin_IPR = vision_rotation(shown.place_IP2, self.config.head_dim, self.config.rope_theta)
        levels: list[jax.Array] = []  # in the order of blocks, whatever the order of their mergers
        for block in range(self.config.depth):
            x_IPC = self.blocks[str(block)](x_IPC, cos_IPR, sin_IPR, shown.frame_IP)
            if block in self.config.deepstack_visual_indexes:
                level = self.config.deepstack_visual_indexes.index(block)
                levels.append(self.deepstack_merger_list[str(level)](x_IPC))
        found = [self.merger(x_IPC), *levels]
        return tuple(tokens.reshape(-1, tokens.shape[-1]) for tokens in found)


def frame_attention(
    q_IPNH: jax.Array, k_IPNH: jax.Array, v_IPNH: jax.Array, frame_IP: jax.Array, *, most_scores: int = MOST_SCORES
) -> jax.Array:
    """Attention of each patch to those of its own frame, [I, P, N, H], with at most so many scores in memory at once.

    What a large picture costs would else be the square of its patches: a head's scores of 16384 patches are 1 GiB.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, frame_q: jax.Array, frame: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, mask=frame_q[:, None, :, None] == frame[:, None, None, :])

    rows, P, N, _ = q_IPNH.shape
    if rows * N * P * P <= most_scores:
        return attend(q_IPNH, k_IPNH, v_IPNH, frame_IP, frame_IP)
    parts = 1  # a row is a power of two long, or three halves of one
    while N * (P // parts) * P > most_scores and P % (2 * parts) == 0:
        parts *= 2
    size = P // parts

    @jax.checkpoint
    def part(which: jax.Array) -> jax.Array:
        row, start = which // parts, which % parts * size
        q, frame_q = (jax.lax.dynamic_slice_in_dim(array[row], start, size) for array in (q_IPNH, frame_IP))
        return attend(q[None], k_IPNH[row][None], v_IPNH[row][None], frame_q[None], frame_IP[row][None])[0]

    at_once = max(1, most_scores // (N * size * P))
    return jax.lax.map(part, jnp.arange(rows * parts), batch_size=at_once).reshape(q_IPNH.shape)


def vision_rotation(place_IP2: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [I, P, R]: half of the pairs turn by the row, half by the column."""
    size = head_dim // 2
    exponents = np.arange(0, size, 2).astype(np.float32) / np.float32(size)
    freq = np.float32(1) / np.power(theta, exponents.astype(np.float64)).astype(np.float32)
    angles = place_IP2[..., None].astype(jnp.float32) * jnp.asarray(freq)
    angles_IPR = angles.reshape(*place_IP2.shape[:2], -1)
    return jnp.cos(angles_IPR), jnp.sin(angles_IPR)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seen:
    """What the tower made of a batch, and where in it that belongs.

    Attributes:
        tokens_UD: the tokens.
        levels: those of every deepstack level, [U, D] each.
        slot_BT: int32, which token stands at each position; -1: none.
    """

    tokens_UD: jax.Array
    levels: tuple[jax.Array, ...]
    slot_BT: jax.Array

    def placed(self, x_BTD: jax.Array) -> jax.Array:
        """Embeddings with the tokens in their places."""
        return jnp.where(self.slot_BT[..., None] >= 0, self._at(self.tokens_UD, x_BTD), x_BTD)

    def ahead(self) -> Seen:
        """For a row of every position's next token: one place earlier, and no token of the tower at the end."""
        return dataclasses.replace(self, slot_BT=jnp.pad(self.slot_BT[:, 1:], ((0, 0), (0, 1)), constant_values=-1))

    def deepened(self, x_BTD: jax.Array, layer: int) -> jax.Array:
        """The residual stream after decoder layer ``layer``, with that level added where something is shown."""
        if layer >= len(self.levels):
            return x_BTD
        return jnp.where(self.slot_BT[..., None] >= 0, x_BTD + self._at(self.levels[layer], x_BTD), x_BTD)

    def _at(self, tokens_UD: jax.Array, x_BTD: jax.Array) -> jax.Array:
        return tokens_UD[jnp.maximum(self.slot_BT, 0)].astype(x_BTD.dtype)
