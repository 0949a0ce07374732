"""Patches from the host, padded frame by frame to sizes that programs share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jax_models.layers.vision import Shown
from loaders.multimodal import VisionInputs
from loaders.vision import VisionConfig
from loaders.vision_grid import Patches

FEWEST_TOKENS = 4  # of a frame, after merging


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
    """What the host checked, padded."""
    shown = framed(config, vision.patches)
    where = np.append(real_tokens(config, shown), -1).astype(np.int32)  # -1 stays -1
    places: list[Any] = [where[vision.slot_BT], vision.delta_B]
    return VisionArrays(shown, *places)


def framed(config: VisionConfig, patches: Patches) -> Shown:
    """Patches as the tower takes them.

    Frames and their patches are padded to powers of two, so that few sizes are ever compiled.
    """
    lengths = np.array(patches.frames)
    frames = 1 << (len(lengths) - 1).bit_length()
    tokens = max(FEWEST_TOKENS, 1 << (int(lengths.max()) // config.merged - 1).bit_length())
    is_real_IP = np.zeros((frames, tokens * config.merged), bool)
    is_real_IP[: len(lengths)] = np.arange(is_real_IP.shape[1]) < lengths[:, None]

    def spread(packed: np.ndarray) -> np.ndarray:
        out = np.zeros((*is_real_IP.shape, packed.shape[1]), packed.dtype)
        out[is_real_IP] = packed
        return out

    packed = (patches.pixels_AX, patches.place_A2, patches.tap_A4, patches.share_A4)
    parts: list[Any] = [*map(spread, packed), is_real_IP]  # from the host: placed where a program runs
    return Shown(*parts)


def real_tokens(config: VisionConfig, shown: Shown) -> np.ndarray:
    """Which of all tokens, padding counted, stand for something: int64, one for each that does."""
    return np.flatnonzero(np.asarray(shown.is_real_IP).reshape(-1)[:: config.merged])
