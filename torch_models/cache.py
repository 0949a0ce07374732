"""What decoding keeps: keys and values, convolution and recurrent state; buffers that steps write in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torch_models.layers.step import Entry, LayerCache


@dataclass
class Cache:
    """The state of a stage for rows that end at the same slot. Its tensors never move.

    Attributes:
        layers: layer number as text -> what the layer keeps, by name; allocated once, written in place.
        key_mask: bool [B, S], slots that hold a real token.
        position: int64 [B], position of each row's next token.
        slot: int64 [], the next slot to fill: what programs read.
        length: the same as a number: what the host reads.
        version: of the weights it was computed with, for people.
        stamp: of those weights; a model whose weights bear another one may not read it (law 7).
    """

    layers: dict[str, LayerCache]
    key_mask: torch.Tensor
    position: torch.Tensor
    slot: torch.Tensor
    length: int
    version: int
    stamp: tuple[tuple[int, int], ...]

    @property
    def capacity(self) -> int:
        """Slots a row has."""
        return self.key_mask.shape[1]

    def advance(self, mask_BT: torch.Tensor) -> None:
        """Count T more slots as filled; positions advance by the real tokens among them."""
        self.position += mask_BT.sum(1)
        self.slot += mask_BT.shape[1]
        self.length += mask_BT.shape[1]


def empty_cache(
    entries: dict[str, dict[str, Entry]],
    *,
    rows: int,
    capacity: int,
    dtype: torch.dtype,
    device: torch.device,
    version: int,
    stamp: tuple[tuple[int, int], ...],
) -> Cache:
    """A cache with no token in it: every entry zero, allocated once."""
    layers = {
        name: {key: torch.zeros(entry.shape, dtype=entry.dtype or dtype, device=device) for key, entry in parts.items()}
        for name, parts in entries.items()
    }
    key_mask = torch.zeros(rows, capacity, dtype=torch.bool, device=device)
    position = torch.zeros(rows, dtype=torch.int64, device=device)
    slot = torch.zeros((), dtype=torch.int64, device=device)
    return Cache(layers, key_mask, position, slot, 0, version, stamp)
