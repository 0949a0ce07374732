"""Patches of images and videos: their order, where each lies in its image, and its place in the learned grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loaders.vision import VisionConfig


@dataclass(frozen=True, slots=True)
class Grid:
    """Patches of one image or video: temporal patches, and rows and columns of each, as ``image_grid_thw`` has them."""

    time: int
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int, int]:
        return self.time, self.height, self.width

    @property
    def patches(self) -> int:
        """How many there are."""
        return self.time * self.height * self.width

    def tokens(self, config: VisionConfig) -> int:
        """Tokens they become."""
        return self.patches // config.merged

    def merged_positions(self, config: VisionConfig) -> np.ndarray:
        """Time, height and width of every token, int32 [3, tokens], from 0."""
        sizes = (self.time, self.height // config.spatial_merge_size, self.width // config.spatial_merge_size)
        return np.indices(sizes, np.int32).reshape(3, -1)

    def places(self, config: VisionConfig) -> np.ndarray:
        """Row and column of every patch, int32 [patches, 2]: the patches of one token follow each other."""
        merge = config.spatial_merge_size
        place_2HW = np.indices((self.height, self.width), np.int32)
        blocks = place_2HW.reshape(2, self.height // merge, merge, self.width // merge, merge)
        frame = blocks.transpose(1, 3, 2, 4, 0).reshape(-1, 2)
        return np.tile(frame, (self.time, 1))


@dataclass(frozen=True, slots=True)
class Patches:
    """All patches of a batch, as a tower takes them.

    Attributes:
        pixels_AX: float32, the numbers of each patch, by channel, frame, row, column.
        place_A2: int32, row and column of each in its image.
        tap_A4: int32, the four entries of the learned position grid around each.
        share_A4: float32, what each of the four counts.
        frames: patches of every frame, in order; patches see those of their own frame.
    """

    pixels_AX: np.ndarray
    place_A2: np.ndarray
    tap_A4: np.ndarray
    share_A4: np.ndarray
    frames: tuple[int, ...]


def patches_of(config: VisionConfig, pixels_AX: np.ndarray, grids: list[Grid]) -> Patches:
    """Everything a tower asks of the patches of ``grids``, whose numbers are ``pixels_AX``, float32."""
    places = [grid.places(config) for grid in grids]
    parts = [_learned(config.grid_side, grid, place) for grid, place in zip(grids, places, strict=True)]
    frames = tuple(grid.height * grid.width for grid in grids for _ in range(grid.time))
    taps, shares = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Patches(pixels_AX, np.concatenate(places), taps, shares, frames)


def _learned(side: int, grid: Grid, place_A2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The learned grid of ``side`` by ``side``, stretched corner to corner over an image: four taps and their shares.

    float32, in the reference's steps: a share is what is left of a quotient.
    """
    axes = []
    for axis, size in enumerate((grid.height, grid.width)):
        source_A = place_A2[:, axis].astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        floor_A = np.floor(source_A)
        tap_A2 = np.clip(floor_A.astype(np.int32)[:, None] + np.arange(2, dtype=np.int32), 0, side - 1)
        distance_A2 = np.abs(source_A[:, None] - floor_A[:, None] - np.arange(2, dtype=np.float32))
        axes.append((tap_A2, np.maximum(np.float32(1) - distance_A2, np.float32(0))))
    (row_A2, row_share_A2), (column_A2, column_share_A2) = axes
    tap_A4 = (row_A2[:, :, None] * side + column_A2[:, None, :]).reshape(-1, 4)
    return tap_A4, (row_share_A2[:, :, None] * column_share_A2[:, None, :]).reshape(-1, 4)
