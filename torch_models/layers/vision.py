"""The vision tower: patches of images and videos to tokens of the text model.

Source: transformers ``Qwen3VLVisionModel``, ``Qwen3_5VisionModel``. Letters beyond the usual: docs/glossary.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from loaders.vision import VisionConfig
from torch_models.layers.linear import Embedding, Linear, empty_param
from torch_models.layers.mlp import ACTIVATIONS, gelu
from torch_models.layers.norm import LayerNorm
from torch_models.layers.rotary import rotate


@dataclass(frozen=True)
class Shown:
    """Patches of all frames, one behind the other.

    Attributes:
        pixels_AX: float32, the numbers of each patch.
        place_A2: int64, row and column of each in its image.
        tap_A4: int64, the four entries of the learned position grid around each.
        share_A4: float32, what each of the four counts.
        frames: patches of every frame.
    """

    pixels_AX: torch.Tensor
    place_A2: torch.Tensor
    tap_A4: torch.Tensor
    share_A4: torch.Tensor
    frames: tuple[int, ...]


class PatchProjection(nn.Module):
    """A convolution whose window is a whole patch: a product. Weight [C, channels, frames, rows, columns]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.weight = empty_param(config.hidden_size, config.in_channels, config.temporal_patch_size, size, size)
        self.bias = empty_param(config.hidden_size)

    def forward(self, x_AX: torch.Tensor) -> torch.Tensor:
        return F.linear(x_AX, self.weight.flatten(1).to(x_AX.dtype), self.bias.to(x_AX.dtype))


class PatchEmbed(nn.Module):
    """Patches to vectors."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = PatchProjection(config)

    def forward(self, x_AX: torch.Tensor) -> torch.Tensor:
        return self.proj(x_AX)


class VisionAttention(nn.Module):
    """Every patch of a frame sees all of it."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.proj = Linear(config.hidden_size, config.hidden_size, bias=True)
        self.num_heads = config.num_heads

    def forward(
        self, x_AC: torch.Tensor, cos_AR: torch.Tensor, sin_AR: torch.Tensor, frames: tuple[int, ...]
    ) -> torch.Tensor:
        q_ANH, k_ANH, v_ANH = self.qkv(x_AC).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        q_ANH, k_ANH = (rotate(x[None], cos_AR[None], sin_AR[None])[0] for x in (q_ANH, k_ANH))
        by_frame = zip(*(x.transpose(0, 1).split(frames, dim=1) for x in (q_ANH, k_ANH, v_ANH)), strict=True)
        out_NAH = torch.cat([F.scaled_dot_product_attention(q[None], k[None], v[None])[0] for q, k, v in by_frame], 1)
        return self.proj(out_NAH.transpose(0, 1).flatten(1))


class VisionMLP(nn.Module):
    """linear_fc2(activation(linear_fc1(x)))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.linear_fc2 = Linear(config.intermediate_size, config.hidden_size, bias=True)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_AC: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(self.activation(self.linear_fc1(x_AC)))


class VisionBlock(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size)
        self.norm2 = LayerNorm(config.hidden_size)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(
        self, x_AC: torch.Tensor, cos_AR: torch.Tensor, sin_AR: torch.Tensor, frames: tuple[int, ...]
    ) -> torch.Tensor:
        x_AC = x_AC + self.attn(self.norm1(x_AC), cos_AR, sin_AR, frames)
        return x_AC + self.mlp(self.norm2(x_AC))


class PatchMerger(nn.Module):
    """The patches of one token side by side, then two layers with the exact GELU between.

    ``norms_merged``: the norm is over all patches of a token (deepstack), not over each.
    """

    def __init__(self, config: VisionConfig, *, norms_merged: bool) -> None:
        super().__init__()
        merged = config.hidden_size * config.merged
        self.norm = LayerNorm(merged if norms_merged else config.hidden_size)
        self.linear_fc1 = Linear(merged, merged, bias=True)
        self.linear_fc2 = Linear(merged, config.out_hidden_size, bias=True)
        self.merged, self.norms_merged = merged, norms_merged

    def forward(self, x_AC: torch.Tensor) -> torch.Tensor:
        """Tokens, [U, D]."""
        if not self.norms_merged:
            x_AC = self.norm(x_AC)
        x_UM = x_AC.reshape(-1, self.merged)
        if self.norms_merged:
            x_UM = self.norm(x_UM)
        return self.linear_fc2(gelu(self.linear_fc1(x_UM)))


class VisionTower(nn.Module):
    """Patch embedding, learned and rotary positions, blocks, mergers."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleDict({str(block): VisionBlock(config) for block in range(config.depth)})
        self.merger = PatchMerger(config, norms_merged=False)
        if config.deepstack_visual_indexes:
            levels = range(len(config.deepstack_visual_indexes))
            self.deepstack_merger_list = nn.ModuleDict(
                {str(level): PatchMerger(config, norms_merged=True) for level in levels}
            )
        self.config = config

    def forward(self, shown: Shown, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Tokens that stand for the patches, [U, D] in ``dtype``, and those of every deepstack level.

        Args:
            shown: the patches.
            dtype: what is computed in.
        """
        x_AC = self.patch_embed(shown.pixels_AX.to(dtype))
        learned_AC = (self.pos_embed(shown.tap_A4, torch.float32) * shown.share_A4[..., None]).sum(1)
        x_AC = x_AC + learned_AC.to(dtype)
        cos_AR, sin_AR = vision_rotation(shown.place_A2, self.config.head_dim, self.config.rope_theta)
        levels: list[torch.Tensor] = []  # in the order of blocks, whatever the order of their mergers
        for block in range(self.config.depth):
            x_AC = self.blocks[str(block)](x_AC, cos_AR, sin_AR, shown.frames)
            if block in self.config.deepstack_visual_indexes:
                level = self.config.deepstack_visual_indexes.index(block)
                levels.append(self.deepstack_merger_list[str(level)](x_AC))
        return self.merger(x_AC), *levels


def vision_rotation(place_A2: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [A, R]: half of the pairs turn by the row, half by the column."""
    size = head_dim // 2
    freq = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=place_A2.device) / size)
    angles_AR = (place_A2[..., None].float() * freq).flatten(1)
    return angles_AR.cos(), angles_AR.sin()


@dataclass(frozen=True)
class Seen:
    """What the tower made of a batch, and where in it that belongs.

    Attributes:
        tokens_UD: the tokens.
        levels: those of every deepstack level, [U, D] each.
        slot_BT: int64, which token stands at each position; -1: none.
    """

    tokens_UD: torch.Tensor
    levels: tuple[torch.Tensor, ...]
    slot_BT: torch.Tensor

    def placed(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Embeddings with the tokens in their places."""
        return torch.where(self.slot_BT[..., None] >= 0, self._at(self.tokens_UD, x_BTD), x_BTD)

    def ahead(self) -> Seen:
        """For a row of every position's next token: one place earlier, and no token of the tower at the end."""
        return dataclasses.replace(self, slot_BT=F.pad(self.slot_BT[:, 1:], (0, 1), value=-1))

    def deepened(self, x_BTD: torch.Tensor, layer: int) -> torch.Tensor:
        """The residual stream after decoder layer ``layer``, with that level added where something is shown."""
        if layer >= len(self.levels):
            return x_BTD
        return torch.where(self.slot_BT[..., None] >= 0, x_BTD + self._at(self.levels[layer], x_BTD), x_BTD)

    def _at(self, tokens_UD: torch.Tensor, x_BTD: torch.Tensor) -> torch.Tensor:
        return tokens_UD[self.slot_BT.clamp(min=0)].to(x_BTD.dtype)
