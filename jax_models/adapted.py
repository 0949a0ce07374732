"""What a model offers of adapters; how it is done stands in ``jax_models.adapters``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

import numpy as np

from jax_models import adapters
from jax_models.adapter_room import Room, RowAdapters
from jax_models.ambient import with_transfers
from loaders.adapters.roster import NONE, AdapterOfRows, Attached, Roster

if TYPE_CHECKING:
    from jax_models.model import Model


class Adapted:
    """The adapters of a model: base of ``jax_models.model.Model``, which has the fields."""

    roster: Roster
    room: Room

    @property
    def adapters(self) -> dict[str, Attached]:
        """What is attached, by name, in the order in which it came: the last one runs where nobody says which."""
        return {one.name: one for one in self.roster.attached}

    @with_transfers
    def attach_lora(self, uri: str | os.PathLike[str], name: str = "default") -> Model:
        """A model with a PEFT adapter, or with it in the place of another one; see ``jax_models.adapters``.

        It runs for every row, unless ``adapter=`` of a call says otherwise.
        """
        return adapters.attach_lora(self._model, uri, name)

    @with_transfers
    def detach_lora(self, name: str = "default") -> Model:
        """A model without an adapter; see ``jax_models.adapters``."""
        return adapters.detach_lora(self._model, name)

    @with_transfers
    def merge_lora(self, name: str = "default") -> Model:
        """A model with an adapter in its weights, rounded once; see ``jax_models.adapters``."""
        return adapters.merge_lora(self._model, name)

    @with_transfers
    def unmerge_lora(self) -> Model:
        """A model with the weights from before, the very arrays; see ``jax_models.adapters``."""
        return adapters.unmerge_lora(self._model)

    def of_rows(self, adapter: AdapterOfRows, rows: int) -> dict[str, RowAdapters]:
        """What a program is given for a batch of ``rows``: ``{"adapters": ...}``, or nothing where no row has one.

        Then the base's own program runs. Raises ValueError, see ``loaders.adapters.roster.Roster.rows``.
        """
        return self.of_slots(self.roster.rows(adapter, rows))

    def of_slots(self, slot_B: np.ndarray) -> dict[str, RowAdapters]:
        """Likewise for slots, int32 [B]."""
        return {} if (slot_B == NONE).all() else {"adapters": self.room.of_rows(slot_B)}

    @property
    def _model(self) -> Model:
        return cast("Model", self)
