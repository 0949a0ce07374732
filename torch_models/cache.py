"""Key/value cache: buffers that decoding steps write in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torch_models.layers.attention import LayerCache


@dataclass
class Cache:
    """Keys and values of every layer of a stage, for rows that end at the same slot.

    Attributes:
        layers: layer number as text -> keys and values [B, S, K, H]; allocated once, written in place.
        key_mask: bool [B, S], slots that hold a real token.
        position: int64 [B], position of each row's next token.
        length: slots filled.
        version: of the weights it was computed with, for people.
        stamp: of those weights; a model whose weights bear another one may not read it (law 7).
    """

    layers: dict[str, LayerCache]
    key_mask: torch.Tensor
    position: torch.Tensor
    length: int
    version: int
    stamp: tuple[tuple[int, int], ...]

    @property
    def capacity(self) -> int:
        """Slots a row has."""
        return self.key_mask.shape[1]

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` more slots as filled; positions advance by the real tokens among them."""
        self.position += self.key_mask[:, self.length : self.length + tokens].sum(1)
        self.length += tokens


def cache_like(
    layers: range,
    rows: int,
    capacity: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    version: int,
    stamp: tuple[tuple[int, int], ...],
) -> Cache:
    """Keys and values for every layer, zero, allocated once."""
    shape = (rows, capacity, heads, head_dim)
    entries = {
        str(layer): LayerCache(
            key=torch.zeros(shape, dtype=dtype, device=device), value=torch.zeros(shape, dtype=dtype, device=device)
        )
        for layer in layers
    }
    key_mask = torch.zeros(rows, capacity, dtype=torch.bool, device=device)
    return Cache(entries, key_mask, torch.zeros(rows, dtype=torch.int64, device=device), 0, version, stamp)
