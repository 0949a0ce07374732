"""What a model offers of images and videos: the tower's tokens, and positions of a prompt that shows something."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from loaders.digest import short_digest
from loaders.host.inputs import ModelInputs
from loaders.host.multimodal import check_shown, rope_index
from loaders.host.vision_grid import Patches
from torch_models.coordination import in_step
from torch_models.host import on_host
from torch_models.layers.vision import Seen, Shown
from torch_models.one_version import of_one_version
from torch_models.precision import in_own_precision

if TYPE_CHECKING:
    from torch_models.model import Model


class Seeing:
    """The eyes of a model: base of ``torch_models.model.Model``."""

    @in_step
    @of_one_version
    @in_own_precision
    def get_image_features(self, pixel_values: Any, image_grid_thw: Any) -> tuple[torch.Tensor, ...]:
        """What the vision tower makes of images alone: tokens [U, D], and those of every deepstack level.

        Args:
            pixel_values: floats [patches, numbers of a patch], as the Hugging Face processor has them.
            image_grid_thw: integers [images, 3].
        Raises:
            ValueError: they do not fit, or this model holds no tower.
            RuntimeError: an update failed half-way; load good weights first.
        """
        model = self._model
        config, grid = model.config.vision, on_host(image_grid_thw)

        def checked() -> Patches:
            model.check_runnable()
            if config is None or not model.stage.has_tower:
                raise ValueError("this model holds no vision tower")
            return check_shown(config, on_host(pixel_values), grid)

        patches = model.agreed("what is shown", checked, lambda found: short_digest(found.pixels_AX, np.asarray(grid)))
        return model.visual(self._shown(patches), model.dtype)

    def get_video_features(self, pixel_values_videos: Any, video_grid_thw: Any) -> tuple[torch.Tensor, ...]:
        """As ``get_image_features``: a video's frames are images."""
        return self.get_image_features(pixel_values_videos, video_grid_thw)

    def get_rope_index(
        self, input_ids: Any, attention_mask: Any = None, **multimodal: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions of a prompt that shows something, int32 [3, B, T], and where rows go on, less their length [B].

        What later stages of a pipeline are to be given as ``position_ids``.

        Raises:
            ValueError: nothing is shown, or it does not fit.
        """
        given = {name: on_host(value) for name, value in multimodal.items()}
        return rope_index(self._model.config, on_host(input_ids), on_host(attention_mask), given=given)

    def seen(self, checked: ModelInputs) -> Seen | None:
        """What the vision tower makes of a batch; None: nothing is shown."""
        if checked.vision is None:
            return None
        model = self._model
        tokens_UD, *levels = model.visual(self._shown(checked.vision.patches), model.dtype)
        return Seen(tokens_UD, tuple(levels), model.long(checked.vision.slot_BT))

    def entered(self, ids_BT: torch.Tensor, seen: Seen | None) -> torch.Tensor:
        """Hidden states of the first stage's first layer, with what is seen in its places."""
        return self._model.embed(ids_BT) if seen is None else self._model.embed(ids_BT, seen)

    def _shown(self, patches: Patches) -> Shown:
        model = self._model
        pixels_AX, share_A4 = (torch.from_numpy(x).to(model.device) for x in (patches.pixels_AX, patches.share_A4))
        return Shown(pixels_AX, model.long(patches.place_A2), model.long(patches.tap_A4), share_A4, patches.frames)

    @property
    def _model(self) -> Model:
        return cast("Model", self)
