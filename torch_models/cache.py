"""What decoding keeps: keys and values, convolution and recurrent state; buffers that steps write in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from torch_models.layers.gated_delta import keep_first
from torch_models.layers.step import Entry, LayerCache

_READ_SLOTS = 64  # attention reads so many at a time, so that steps share sizes


@dataclass
class Filled:
    """How many slots hold something, as the host counts them. Caches of the same memory share one."""

    slots: int = 0


@dataclass
class Cache:
    """The state of a stage for rows that end at the same slot. Its tensors never move.

    Attributes:
        layers: layer number as text -> what the layer keeps, by name; allocated once, written in place.
        key_mask: bool [B, S], slots that hold a real token.
        position: int64 [B], position of each row's next token.
        adapter: int64 [B], slot of each row's adapter, -1 for none.
        slot: int64 [], the next slot to fill: what programs read.
        filled: the same as a number, ``length``: what the host reads.
        version: of the weights it was computed with, for people.
        stamp: of those weights; a model whose weights bear another one may not read it (law 7). Nothing: none may.
        content: digest of the prompt, the adapters and the tokens since: ranks may not go on with different ones.
            Without a mesh it is empty, for nobody asks.
    """

    layers: dict[str, LayerCache]
    key_mask: torch.Tensor
    position: torch.Tensor
    adapter: torch.Tensor
    slot: torch.Tensor
    filled: Filled
    version: int
    stamp: tuple[tuple[int, ...], ...]
    content: str = ""

    @property
    def length(self) -> int:
        """Slots filled."""
        return self.filled.slots

    @length.setter
    def length(self, slots: int) -> None:
        self.filled.slots = slots

    @property
    def capacity(self) -> int:
        """Slots a row has."""
        return self.key_mask.shape[1]

    def first_rows(self, rows: int) -> Cache:
        """The same memory, as a cache of the first ``rows`` rows alone."""
        layers = {name: {key: part[:rows] for key, part in parts.items()} for name, parts in self.layers.items()}
        by_row = {name: getattr(self, name)[:rows] for name in ("key_mask", "position", "adapter")}
        return replace(self, layers=layers, **by_row)

    def with_room(self, tokens: int) -> Cache:
        """The same memory, as a cache of few slots more than are filled and ``tokens`` take: a run reads no others."""
        slots = -(-(self.length + tokens) // _READ_SLOTS) * _READ_SLOTS
        layers = {
            name: {key: part[:, :, :slots] if key in ("key", "value") else part for key, part in parts.items()}
            for name, parts in self.layers.items()
        }
        return replace(self, layers=layers, key_mask=self.key_mask[:, :slots])

    @contextmanager
    def written(self) -> Iterator[None]:
        """Around what writes to it: where that fails on the way, no model reads it any more."""
        stamp, self.stamp = self.stamp, ()
        yield
        self.stamp = stamp

    def reset(self) -> None:
        """No token in it any more, and all of it zero: what a mask hides is still multiplied by 0, and 0 NaN is NaN."""
        for parts in self.layers.values():
            for part in parts.values():
                part.zero_()
        for tensor in (self.key_mask, self.position, self.slot):
            tensor.zero_()
        self.adapter.fill_(-1)
        self.length = 0

    def advance(self, mask_BT: torch.Tensor) -> None:
        """Count T more slots as filled; positions advance by the real tokens among them."""
        self.position += mask_BT.sum(1)
        self.slot += mask_BT.shape[1]
        self.length += mask_BT.shape[1]

    def keep(self, count_B: torch.Tensor, tokens: int) -> None:
        """Go back to the first ``count_B`` of the last ``tokens`` tokens of each row; those were all real.

        Slots of the others stay empty for good, whatever finite values lie in them; ``compact`` gets rid of them. A row
        of which nothing is kept has ended: its convolution and recurrent state mean nothing from then on.
        """
        first = self.slot - tokens
        slots_S = torch.arange(self.capacity, device=count_B.device)
        self.key_mask &= slots_S < first + count_B[:, None]
        self.position += count_B - tokens
        for parts in self.layers.values():
            keep_first(parts, count_B)

    def compact(self) -> None:
        """Drop the empty slots that all rows can do without; rows end at the same slot again. Tensors stay put."""
        slots_S = torch.arange(self.capacity, device=self.slot.device)
        rank_BS = torch.where(slots_S < self.slot, self.key_mask.long(), 2)  # empty, real, not yet used
        order_BS = rank_BS.argsort(dim=1, stable=True)
        length = int(self.key_mask.sum(1).max())
        order_BS = order_BS.roll(length - self.length, dims=1)
        for parts in self.layers.values():
            for key in ("key", "value"):
                if key in parts:
                    parts[key].copy_(torch.take_along_dim(parts[key], order_BS[:, None, :, None], dim=2))
        self.key_mask.copy_(torch.take_along_dim(self.key_mask, order_BS, dim=1) & (slots_S < length))
        self.slot.fill_(length)
        self.length = length


def empty_cache(
    entries: dict[str, dict[str, Entry]],
    *,
    rows: int,
    capacity: int,
    dtype: torch.dtype,
    device: torch.device,
    version: int,
    stamp: tuple[tuple[int, ...], ...],
) -> Cache:
    """A cache with no token in it: every entry zero, allocated once."""
    layers = {
        name: {key: torch.zeros(entry.shape, dtype=entry.dtype or dtype, device=device) for key, entry in parts.items()}
        for name, parts in entries.items()
    }
    key_mask = torch.zeros(rows, capacity, dtype=torch.bool, device=device)
    position = torch.zeros(rows, dtype=torch.int64, device=device)
    adapter = torch.full((rows,), -1, dtype=torch.int64, device=device)
    slot = torch.zeros((), dtype=torch.int64, device=device)
    return Cache(layers, key_mask, position, adapter, slot, Filled(), version, stamp)
