"""The vision tower in float64, image by image, and what it makes of a prompt.

Source: transformers ``Qwen3VLModel``, ``Qwen3_5Model`` (5.23). Letters: docs/glossary.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from loaders.vision import VisionConfig
from parity.oracles.pieces import gelu, gelu_tanh, relu, silu, softmax
from parity.oracles.run import Weights

ACTIVATIONS = {"gelu": gelu, "gelu_pytorch_tanh": gelu_tanh, "relu": relu, "silu": silu}
LAYER_NORM_EPS = 1e-6  # whatever the config says
KINDS = (("pixel_values", "image_grid_thw", 1), ("pixel_values_videos", "video_grid_thw", 2))  # and its token type


@dataclass(frozen=True)
class Sight:
    """What a prompt shows.

    Attributes:
        where: row and token of every placeholder that is filled, int64 [2, U].
        tokens_UD: what the tower says of each, float64.
        levels: what it says at every deepstack level.
        positions: [3, B, T], time, height and width of every token.
    """

    where: np.ndarray
    tokens_UD: np.ndarray
    levels: tuple[np.ndarray, ...]
    positions: np.ndarray

    def placed(self, x_BTD: np.ndarray) -> np.ndarray:
        """Embeddings with what is shown in its places."""
        x_BTD = x_BTD.copy()
        x_BTD[tuple(self.where)] = self.tokens_UD
        return x_BTD

    def deepened(self, x_BTD: np.ndarray, layer: int) -> np.ndarray:
        """The residual stream after a decoder layer, with its level added."""
        if layer < len(self.levels):
            x_BTD = x_BTD.copy()
            x_BTD[tuple(self.where)] += self.levels[layer]
        return x_BTD


def look(
    config: VisionConfig, read: Weights, ids_BT: np.ndarray, mask_BT: np.ndarray, shown: Mapping[str, np.ndarray]
) -> Sight | None:
    """Run the tower on everything shown and find its places; None: nothing is shown.

    Raises:
        ValueError: placeholders and pictures do not fit.
    """
    types_BT = np.zeros_like(ids_BT)
    for token, kind in ((config.image_token_id, 1), (config.video_token_id, 2)):
        types_BT[ids_BT == token] = kind
    types_BT = np.where(mask_BT, shown.get("mm_token_type_ids", types_BT), 0)
    where, found, grids = [], [], {}
    for pixel_name, grid_name, kind in KINDS:
        grids[kind] = [tuple(map(int, grid)) for grid in shown.get(grid_name, ())]
        places = np.argwhere(types_BT == kind)
        start = 0
        for grid in grids[kind]:
            count = math.prod(grid)
            found.append(_tower(config, read, shown[pixel_name][start : start + count].astype(np.float64), grid))
            start += count
        needed = sum(math.prod(grid) for grid in grids[kind]) // config.spatial_merge_size**2
        if len(places) != needed:
            raise ValueError(f"{len(places)} placeholders of type {kind}, but {grid_name} {grids[kind]} needs {needed}")
        where.append(places)
    if not found:
        return None
    tokens, *levels = (np.concatenate(parts) for parts in zip(*found, strict=True))
    positions = _positions(types_BT, mask_BT, grids, config.spatial_merge_size)
    return Sight(np.concatenate(where).T, tokens, tuple(levels), positions)


def _tower(config: VisionConfig, read: Weights, x_PX: np.ndarray, grid: tuple[int, int, int]) -> list[np.ndarray]:
    """Tokens of one image or video, float64 [U, D], and those of every level. P counts its patches here."""
    time, height, width = grid
    merge, size = config.spatial_merge_size, config.hidden_size
    frame = [
        (top * merge + row, left * merge + column)
        for top in range(height // merge)
        for left in range(width // merge)
        for row in range(merge)
        for column in range(merge)
    ]
    rows, columns = np.array(frame * time).T
    kernel = read(
        "patch_embed.proj.weight",
        *(size, config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size),
    )
    x_PC = x_PX @ kernel.reshape(size, -1).T + read("patch_embed.proj.bias", size)
    x_PC = x_PC + _learned(config, read, rows, columns, height, width)
    half = size // config.num_heads // 2
    frequencies = config.rope_theta ** (-np.arange(0, half, 2) / half)
    angles_PR = np.concatenate([np.outer(rows, frequencies), np.outer(columns, frequencies)], axis=1)
    levels = []  # in the order of blocks
    for block in range(config.depth):
        own = read.under(f"blocks.{block}.")
        x_PC = x_PC + _attention(config, own, _norm(own, "norm1", x_PC), angles_PR, frames=time)
        inner = _biased(own, "mlp.linear_fc1", _norm(own, "norm2", x_PC), config.intermediate_size)
        x_PC = x_PC + _biased(own, "mlp.linear_fc2", ACTIVATIONS[config.hidden_act](inner), size)
        if block in config.deepstack_visual_indexes:  # those of no block are not used
            level = config.deepstack_visual_indexes.index(block)
            merged = x_PC.reshape(-1, merge * merge * size)
            levels.append(_merge(config, read.under(f"deepstack_merger_list.{level}."), merged, normed=False))
    merged = _norm(read, "merger.norm", x_PC).reshape(-1, merge * merge * size)
    return [_merge(config, read.under("merger."), merged, normed=True), *levels]


def _learned(
    config: VisionConfig, read: Weights, rows: np.ndarray, columns: np.ndarray, height: int, width: int
) -> np.ndarray:
    """The learned grid stretched corner to corner over the image, bilinearly."""
    side = math.isqrt(config.num_position_embeddings)
    grid = read("pos_embed.weight", config.num_position_embeddings, config.hidden_size)
    grid = grid[: side**2].reshape(side, side, -1)
    out = 0.0
    y, x = rows * (side - 1) / max(height - 1, 1), columns * (side - 1) / max(width - 1, 1)
    for down in (0, 1):
        for right in (0, 1):
            at_y, at_x = np.minimum(np.floor(y) + down, side - 1), np.minimum(np.floor(x) + right, side - 1)
            share = np.abs(1 - down - (y - np.floor(y))) * np.abs(1 - right - (x - np.floor(x)))
            out = out + grid[at_y.astype(int), at_x.astype(int)] * share[:, None]
    return np.asarray(out)


def _attention(config: VisionConfig, read: Weights, x_PC: np.ndarray, angles_PR: np.ndarray, frames: int) -> np.ndarray:
    """Among the patches of each frame."""
    size, heads = config.hidden_size, config.num_heads
    qkv = _biased(read, "attn.qkv", x_PC, 3 * size).reshape(frames, -1, 3, heads, size // heads)
    turn = angles_PR.reshape(frames, -1, 1, angles_PR.shape[-1])
    q, k = (_turned(qkv[:, :, part], turn) for part in (0, 1))
    scores = np.einsum("fpnh,fsnh->fnps", q, k) * (size // heads) ** -0.5
    mixed = np.einsum("fnps,fsnh->fpnh", softmax(scores), qkv[:, :, 2])
    return _biased(read, "attn.proj", mixed.reshape(-1, size), size)


def _turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    a, b = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _merge(config: VisionConfig, read: Weights, x_UM: np.ndarray, *, normed: bool) -> np.ndarray:
    x_UM = x_UM if normed else _norm(read, "norm", x_UM)
    inner = _biased(read, "linear_fc1", x_UM, x_UM.shape[1])
    return _biased(read, "linear_fc2", gelu(inner), config.out_hidden_size)


def _norm(read: Weights, name: str, x: np.ndarray) -> np.ndarray:
    size = x.shape[-1]
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + LAYER_NORM_EPS)
    return read(f"{name}.weight", size) * centred / deviation + read(f"{name}.bias", size)


def _biased(read: Weights, name: str, x: np.ndarray, size: int) -> np.ndarray:
    return x @ read.matrix(name, size, x.shape[-1]).T + read(f"{name}.bias", size)


def _positions(
    types_BT: np.ndarray, mask_BT: np.ndarray, grids: Mapping[int, list[tuple[int, int, int]]], merge: int
) -> np.ndarray:
    """[3, B, T]: text counts on in all three; an image counts its grid from where it stands; frames are images."""
    positions = np.zeros((3, *types_BT.shape), np.int64)
    frames = {kind: [(t, h // merge, w // merge) for t, h, w in some] for kind, some in grids.items()}
    frames[2] = [(1, h, w) for t, h, w in frames[2] for _ in range(t)]
    for row, mask_T in enumerate(mask_BT):
        steps, at, start = np.flatnonzero(mask_T), 0, 0
        while at < len(steps):
            kind = types_BT[row, steps[at]]
            if kind == 0:
                positions[:, row, steps[at]] = start
                at, start = at + 1, start + 1
                continue
            time, height, width = frames[kind].pop(0)
            for number in range(time * height * width):
                place = (number // (height * width), number // width % height, number % width)
                positions[:, row, steps[at + number]] = start + np.array(place)
            at, start = at + time * height * width, start + max(height, width)
    return positions
