"""What programs read: rows of tokens, and what goes with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from jax_models.frames import VisionArrays, vision_arrays
from loaders.host.inputs import ModelInputs
from loaders.spec import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows as a program takes them; host arrays, placed nowhere, are cut over the mesh there.

    Attributes:
        entry: token ids, int32 [B, T]; of a stage that is not the first, hidden states [B, T, D].
        mask_BT: bool, real tokens.
        position_ids: int32 [B, T]; [3, B, T] where the rotary embedding has several axes.
        vision: what is shown; None: nothing.
    """

    entry: Any
    mask_BT: Any
    position_ids: Any
    vision: VisionArrays | None = None


def batch_of(config: ModelConfig, checked: ModelInputs, entry: Any = None) -> Batch:
    """What the host checked. ``entry``: hidden states; None: its tokens are what is read."""
    vision = None
    if checked.vision is not None:
        assert config.vision is not None
        vision = vision_arrays(config.vision, checked.vision)
    return Batch(checked.input_ids if entry is None else entry, checked.attention_mask, checked.position_ids, vision)
