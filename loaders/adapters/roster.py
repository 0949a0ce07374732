"""Which adapters a model has, in which slot each, and how much room there is: one bookkeeping for both backends.

Room comes in buckets, so that adapters can come, go and change places without another shape: of slots 4, 8, 16, ...; of
the rank of every module's update 8, 16, 32, ...; of copies of a module that adapters replace whole, which are as large
as it is, 1, 2, 4, ... So four adapters of one layout share JAX's programs and torch's graphs, from the first on. A
fifth, one of more targets or of a larger bucket of ranks, and a second one that replaces a module, compile and capture
anew: attach the one that asks for most first. An empty slot costs its zeros and their product in every run. Room is
given back when the last adapter goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from loaders.adapters.updates import Adapter
from loaders.errors import brief

NONE = -1  # the slot of a row without adapter
SMALLEST_RANK, FEWEST_SLOTS = 8, 4

AdapterOfRows = str | Sequence[str | None] | None


@dataclass(frozen=True)
class Attached:
    """An adapter in its slot. ``version``: of the model that it came with."""

    name: str
    adapter: Adapter
    slot: int
    version: int


@dataclass(frozen=True)
class Layout:
    """The room there is.

    Attributes:
        slots: adapters that fit.
        ranks: site -> rank of its stacks.
        places: module -> how many adapters may replace its tensors.
    """

    slots: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)
    places: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Roster:
    """The adapters of one model, in the order in which they came; the last one is active where nobody says which.

    Attributes:
        attached: all of them.
        layout: the room for them.
        merged: name of the one that is in the base's weights; None: none is.
    """

    attached: tuple[Attached, ...] = ()
    layout: Layout = Layout()
    merged: str | None = None

    def __getitem__(self, name: str) -> Attached:
        """Raises ValueError for a name that nobody has."""
        for one in self.attached:
            if one.name == name:
                return one
        raise ValueError(f"no adapter is called {name!r}. Attached: {self._names()}")

    def having(self, adapter: Adapter, name: str, version: int) -> Roster:
        """With one more, or another one under a name that is taken; it takes the slot that is free first."""
        others = tuple(one for one in self.attached if one.name != name)
        taken = {one.slot for one in others}
        slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        slot = next((one.slot for one in self.attached if one.name == name), slot)
        attached = (*others, Attached(name, adapter, slot, version))
        return replace(self, attached=attached, layout=_grown(self.layout, attached))

    def lacking(self, name: str) -> Roster:
        """Without one; the room stays for others, until the last one goes. Raises ValueError for a name nobody has."""
        gone = self[name]
        attached = tuple(one for one in self.attached if one is not gone)
        return replace(self, attached=attached, layout=self.layout if attached else Layout())

    def rows(self, adapter: AdapterOfRows, count: int) -> np.ndarray:
        """Slot of each of ``count`` rows, int32; ``NONE`` for a row without.

        Args:
            adapter: a name for all rows; a name or None (the base alone) for each; None: the one that came last.
            count: rows of the batch.
        Raises:
            ValueError: a name nobody has, another number of rows, or another adapter than the one that is merged.
        """
        names = self._of_rows(adapter, count)
        if self.merged is not None:
            self._check_merged(adapter, names)
            return np.full(count, NONE, np.int32)
        return np.array([NONE if name is None else self._slot(name) for name in names], np.int32)

    def places(self, module: str) -> dict[int, int]:
        """Slot -> place of every adapter that replaces tensors of a module."""
        slots = sorted(one.slot for one in self.attached if module in modules_replaced(one.adapter))
        return {slot: place for place, slot in enumerate(slots)}

    def check_unmerged(self, what: str) -> None:
        """Raises ValueError while an adapter is merged."""
        if self.merged is not None:
            raise ValueError(f"adapter {self.merged!r} is merged: {what} would mix it in. Call unmerge_lora first.")

    def _slot(self, name: str) -> int:
        """Where a row of an adapter looks; one that changes nothing is none, so that the base's own program runs."""
        return NONE if self[name].adapter.is_nothing else self[name].slot

    def _of_rows(self, adapter: AdapterOfRows, count: int) -> list[str | None]:
        if adapter is None:
            return [self.attached[-1].name if self.attached else None] * count
        if isinstance(adapter, str):
            return [self[adapter].name] * count
        is_array = isinstance(adapter, np.ndarray) and adapter.ndim > 0
        is_by_row = is_array or (isinstance(adapter, Sequence) and not isinstance(adapter, bytes))
        names: list[Any] = list(adapter) if is_by_row else [adapter]
        if wrong := [name for name in names if not isinstance(name, str | None)]:
            raise ValueError(f"adapter has {brief(wrong[0])}, expected a name, or for each row a name or None")
        if len(names) != count:
            raise ValueError(f"adapter names {len(names)} rows, expected one name or None for each of {count}")
        return [None if name is None else self[name].name for name in names]

    def _check_merged(self, adapter: AdapterOfRows, names: list[str | None]) -> None:
        if adapter is not None and any(name != self.merged for name in names):
            self.check_unmerged("running another one, or none,")

    def _names(self) -> str:
        return ", ".join(repr(one.name) for one in self.attached) or "none"


def check_name(name: object) -> None:
    """Raises ValueError for what cannot be an adapter's name."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"name is {brief(name)}, expected the adapter's name, a string that is not empty")


def modules_replaced(adapter: Adapter) -> frozenset[str]:
    """Modules whose tensors an adapter replaces whole."""
    return frozenset(name.rpartition(".")[0] for name in adapter.whole)


def padded(update: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """A half of an update with zeros up to the rank of its stack."""
    widths = [(0, 0)] * update.ndim
    widths[axis] = (0, rank - update.shape[axis])
    return np.pad(update, widths)


def _grown(layout: Layout, attached: tuple[Attached, ...]) -> Layout:
    """Room for all of ``attached``, and no less than there was."""
    ranks, places = dict(layout.ranks), dict(layout.places)
    for one in attached:
        for path, update in one.adapter.low_rank.items():
            ranks[path] = max(ranks.get(path, 0), _bucket(update.rank, SMALLEST_RANK))
    # in an order that all processes of a mesh have: they place the copies one by one, together
    for module in sorted({module for one in attached for module in modules_replaced(one.adapter)}):
        count = sum(module in modules_replaced(one.adapter) for one in attached)
        places[module] = max(places.get(module, 0), _bucket(count, 1))
    slots = max(layout.slots, _bucket(1 + max(one.slot for one in attached), FEWEST_SLOTS))
    return Layout(slots, ranks, places)


def _bucket(count: int, smallest: int) -> int:
    return max(smallest, 1 << (count - 1).bit_length())
