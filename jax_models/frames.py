"""Patches from the host, frames side by side in rows of sizes that programs share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jax_models.layers.vision import NO_FRAME, Shown
from loaders.host.multimodal import VisionInputs
from loaders.host.vision_grid import Patches
from loaders.vision import VisionConfig

FEWEST_TOKENS = 4  # of a row, after merging


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VisionArrays:
    """What a batch shows, for programs.

    Attributes:
        shown: the patches.
        slot_BT: int32, which of the tower's tokens, padding counted, stands at each position; -1: none.
        delta_B: int32, what a row's next position is beyond the number of its tokens.
    """

    shown: Shown
    slot_BT: jax.Array
    delta_B: jax.Array


def vision_arrays(config: VisionConfig, vision: VisionInputs) -> VisionArrays:
    """What the host checked, in rows."""
    shown, token_U = framed(config, vision.patches)
    where = np.append(token_U, -1).astype(np.int32)  # -1 stays -1
    places: list[Any] = [where[vision.slot_BT], vision.delta_B]
    return VisionArrays(shown, *places)


def framed(config: VisionConfig, patches: Patches) -> tuple[Shown, np.ndarray]:
    """Patches as the tower takes them, and where its tokens then are: int64, one for each that stands for something.

    A row is as long as the longest frame; shorter ones lie side by side in it, so that a picture among thumbnails, or
    beside a video, costs no more than its own room. Rows and their length are rounded up, so that few sizes are ever
    compiled.
    """
    tokens = [length // config.merged for length in patches.frames]
    longest = max(FEWEST_TOKENS, _rounded_up(max(tokens)))
    row_F, start_F = side_by_side(tokens, longest)
    rows = _rounded_up(int(row_F.max()) + 1)
    first_F = row_F * longest + start_F
    token_U = np.concatenate([first + np.arange(count) for first, count in zip(first_F, tokens, strict=True)])
    place_A = (token_U[:, None] * config.merged + np.arange(config.merged)).reshape(-1)
    length = longest * config.merged

    def spread(packed: np.ndarray, empty: int = 0) -> np.ndarray:
        out = np.full((rows * length, *packed.shape[1:]), empty, packed.dtype)
        out[place_A] = packed
        return out.reshape(rows, length, *packed.shape[1:])

    frame_A = np.repeat(np.arange(len(tokens), dtype=np.int32), patches.frames)
    packed = (patches.pixels_AX, patches.place_A2, patches.tap_A4, patches.share_A4)
    parts: list[Any] = [*map(spread, packed), spread(frame_A, NO_FRAME)]  # from the host: placed where a program runs
    return Shown(*parts), token_U


def side_by_side(lengths: list[int], room: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and start of each, int64: the longest first, each in the first row that still has room for it."""
    row, start = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    filled = np.zeros(len(lengths), np.int64)
    for one in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        row[one] = np.argmax(filled + lengths[one] <= room)
        start[one] = filled[row[one]]
        filled[row[one]] += lengths[one]
    return row, start


def _rounded_up(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: at most half as much again."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power
