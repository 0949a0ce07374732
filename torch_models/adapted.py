"""What a model offers of adapters; how it is done stands in ``torch_models.adapters``."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

from loaders.adapters.roster import AdapterOfRows, Attached, Roster
from torch_models import adapters
from torch_models.adapter_room import Room
from torch_models.coordination import in_step

if TYPE_CHECKING:
    from torch_models.model import Model


class Adapted:
    """The adapters of a model: base of ``torch_models.model.Model``.

    Attributes:
        roster: which adapters there are.
        room: the memory they lie in.
        adapter_changes: number of their last change, of which no two have the same; part of what caches are kept by.
    """

    def __init__(self) -> None:
        self.roster, self.room = Roster(), Room()
        self.adapter_changes = 0

    @property
    def adapters(self) -> dict[str, Attached]:
        """What is attached, by name, in the order in which it came: the last one runs where nobody says which."""
        return {one.name: one for one in self.roster.attached}

    @in_step
    def attach_lora(self, uri: str | os.PathLike[str], name: str = "default") -> Model:
        """Attach a PEFT adapter, or put it in the place of another one; see ``torch_models.adapters``.

        From then on it runs for every row, unless ``adapter=`` of a call says otherwise.
        """
        return adapters.attach_lora(self._model, uri, name)

    @in_step
    def detach_lora(self, name: str = "default") -> Model:
        """Take an adapter away; see ``torch_models.adapters``."""
        return adapters.detach_lora(self._model, name)

    @in_step
    def merge_lora(self, name: str = "default") -> Model:
        """Write an adapter into the weights, rounded once; see ``torch_models.adapters``."""
        return adapters.merge_lora(self._model, name)

    @in_step
    def unmerge_lora(self) -> Model:
        """Bring the weights from before back, bit for bit; see ``torch_models.adapters``."""
        return adapters.unmerge_lora(self._model)

    def running(self, adapter: AdapterOfRows, batch: Any) -> AbstractContextManager[None]:
        """Inside, each row of ``batch`` [B, ...] runs with its adapter; see ``loaders.adapters.roster.Roster.rows``."""
        return adapters.running(self._model, adapter, len(batch))

    @property
    def _model(self) -> Model:
        return cast("Model", self)
