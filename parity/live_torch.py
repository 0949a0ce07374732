"""A live torch model seen from outside: what may not move, how to poison it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from parity.backends import Backend
from torch_models.census import pointer_census


@dataclass(frozen=True)
class TorchLive:
    """What the laws need to know of torch; see ``parity.live_model.LiveBackend``."""

    backend: Backend
    poison_publishes: bool = False
    keeps_old: bool = False

    def fixed(self, model: Any) -> dict[str, Any]:
        """Everything a captured graph remembers: the address of every parameter and buffer."""
        return dict(pointer_census(model)) | {"model": id(model)}

    def compiled(self, model: Any) -> dict[str, int]:
        """Nothing is compiled."""
        return {}

    def not_shared(self, old: Any, new: Any, changed: set[str]) -> list[str]:
        """Nothing: the addresses in ``fixed`` say it all."""
        return []

    @torch.no_grad()
    def poison(self, model: Any) -> Any:
        """Every parameter NaN, behind the model's back: what the next load does not write will scream."""
        for param in model.parameters():
            param.fill_(float("nan"))
        return model

    def stage_tolerance(self, model: Any) -> float:
        """The same kernels on the same numbers."""
        return 0.0


def live(backend: Backend) -> TorchLive:
    return TorchLive(backend)
