"""What a model offers of images and videos: the tower's tokens, and positions of a prompt that shows something."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np

from jax_models.ambient import in_own_settings
from jax_models.frames import framed
from jax_models.processes import content_of
from loaders.host.multimodal import check_shown, rope_index
from loaders.host.vision_grid import Patches

if TYPE_CHECKING:
    from jax_models.model import Model


class Seeing:
    """The eyes of a model: base of ``jax_models.model.Model``."""

    @in_own_settings
    def get_image_features(self, pixel_values: Any, image_grid_thw: Any) -> tuple[jax.Array, ...]:
        """What the vision tower makes of images alone: tokens [U, D], and those of every deepstack level.

        Args:
            pixel_values: floats [patches, numbers of a patch], as the Hugging Face processor has them.
            image_grid_thw: integers [images, 3].
        Raises:
            ValueError: they do not fit, or this model holds no tower.
        """
        model = self._model
        config = model.config.vision

        def checked() -> Patches:
            if config is None or not model.stage.has_tower:
                raise ValueError("this model holds no vision tower")
            return check_shown(config, pixel_values, image_grid_thw)

        patches = model.agreed("what is shown", checked, lambda found: content_of(found.pixels_AX, image_grid_thw))
        assert config is not None
        shown, token_U = framed(config, patches)
        return tuple(tokens[token_U] for tokens in model.programs.see(model.weights, shown))

    def get_video_features(self, pixel_values_videos: Any, video_grid_thw: Any) -> tuple[jax.Array, ...]:
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
        return rope_index(self._model.config, input_ids, attention_mask, given=multimodal)

    @property
    def _model(self) -> Model:
        return cast("Model", self)
