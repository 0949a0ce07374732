"""Prompts that show something: images of different sizes, a video with its timestamps, and a row of text alone."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from loaders.host.vision_grid import Grid
from loaders.spec import ModelConfig
from parity.zoo.checkpoints import prompts

# what each row shows, between its text; the third nothing. Sizes in patches, times spatial_merge_size
IMAGES: tuple[tuple[tuple[int, int], ...], ...] = (((2, 3), (4, 2)), ((1, 5),), ())
VIDEOS: tuple[tuple[tuple[int, int, int], ...], ...] = ((), ((3, 2, 2),), ())  # frames too


def pictures(
    config: ModelConfig,
    *,
    rows: int = 3,
    tokens: int = 96,
    padding: Literal["right", "left", "both"] | None = "right",
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Everything a model takes, under the Hugging Face processor's names: ``parity.zoo.prompts`` with pictures in it.

    Args:
        config: of a model that sees.
        rows: of the batch, each as one of the three above, in turn.
        tokens: of the longest row.
        padding: see ``prompts``.
        seed: of text and pictures.
    """
    tower = config.vision
    assert tower is not None, f"{config.architecture} sees nothing"
    found = prompts(config, rows=rows, tokens=tokens, padding=padding, seed=seed)
    rng = np.random.default_rng([seed, rows, tokens, 1])
    merge = tower.spatial_merge_size
    types_BT = np.zeros_like(found["input_ids"])
    grids: dict[str, list[Grid]] = {"image": [], "video": []}
    for row in range(rows):
        at = int(np.flatnonzero(found["attention_mask"][row])[0]) + 3  # text first
        shown = [("image", Grid(1, h * merge, w * merge)) for h, w in IMAGES[row % len(IMAGES)]]
        shown += [("video", Grid(t, h * merge, w * merge)) for t, h, w in VIDEOS[row % len(VIDEOS)]]
        for kind, grid in shown:
            grids[kind].append(grid)
            for _ in range(grid.time):  # a frame's timestamp stands before it
                size = grid.tokens(tower) // grid.time
                found["input_ids"][row, at : at + size] = getattr(tower, f"{kind}_token_id")
                types_BT[row, at : at + size] = 1 if kind == "image" else 2
                at += size + 2
    pixels = {
        kind: rng.standard_normal((sum(grid.patches for grid in some), tower.patch_numbers)).astype(np.float32)
        for kind, some in grids.items()
        if some
    }
    names: dict[str, Any] = {
        "image": ("pixel_values", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }
    for kind, values in pixels.items():
        found[names[kind][0]] = values
        found[names[kind][1]] = np.array([grid.size for grid in grids[kind]], np.int64)
    return found | {"mm_token_type_ids": types_BT}
