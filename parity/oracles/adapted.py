"""What an adapter makes of stored weights, in float64: every update is added to its weight.

Source: arXiv:2106.09685; peft 0.21.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from loaders.adapters.updates import Adapter, LowRank

_EXPERT = re.compile(r"(?P<stack>.*\.experts)\.(?P<expert>\d+)\.(?P<part>gate|up|down)_proj")


@dataclass(frozen=True)
class Adapted:
    """An adapter, by the names a checkpoint has.

    ``spelled``: path of the text model there; ``ours``: its path in the adapter.
    """

    adapter: Adapter
    spelled: str
    ours: str

    def whole(self, tensor: str) -> np.ndarray | None:
        """A tensor that stands for the checkpoint's; None: the checkpoint's own does."""
        return self.adapter.whole.get(self._name(tensor))

    def delta(self, module: str) -> np.ndarray | None:
        """What is added to the weight of a linear layer or of one expert, [out, in]; to that of an embedding [V, D]."""
        name = self._name(module)
        if (match := _EXPERT.fullmatch(name)) is not None:
            stack = "down_proj" if match["part"] == "down" else "gate_up_proj"
            update = self.adapter.low_rank.get(f"{match['stack']}.{stack}")
            place = (int(match["expert"]), *((match["part"] == "up",) if stack == "gate_up_proj" else ()))
            return None if update is None else _product(update, tuple(map(int, place)))
        update = self.adapter.low_rank.get(name)
        if update is None:
            return None
        return _product(update).T if update.site.kind == "embedding" else _product(update)

    def _name(self, name: str) -> str:
        return self.ours + name.removeprefix(self.spelled) if name.startswith(f"{self.spelled}.") else name


def _product(update: LowRank, place: tuple[int, ...] = ()) -> np.ndarray:
    return update.scaling * (update.b[place].astype(np.float64) @ update.a[place].astype(np.float64))
