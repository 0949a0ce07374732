"""The oracle's own taps: what each step makes of values that come from elsewhere.

They have the names that the models' taps have, and share no code with them. With everything a backend computed handed
in, each step of the oracle says what that backend should have made of its own inputs: its local errors, all in one run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Taps:
    """What is handed to an oracle's steps, and what they made of it.

    Attributes:
        inject: values by path; the steps after go on from them. Floats are widened, chosen experts are integers.
        only: path of a decoder layer; the others are not computed where their output is handed in.
        shake: a relative random error on what is handed in: how far a step moves says how much it amplifies rounding.
        found: what each step computed, float64 or int32, by path, in order of execution.
    """

    inject: Mapping[str, np.ndarray] = field(default_factory=dict)
    only: str | None = None
    shake: float = 0.0
    found: dict[str, np.ndarray] = field(default_factory=dict)

    def __call__(self, path: str, value: np.ndarray) -> np.ndarray:
        """Write down a step's result, and give what the next one is to go on from.

        Raises:
            ValueError: what was handed in has another shape.
        """
        self.found[path] = value
        given = self.inject.get(path)
        if given is None:
            return value
        if given.shape != value.shape:
            raise ValueError(f"{path} is {given.shape}, but the oracle's is {value.shape}. Is it of the same inputs?")
        if value.dtype.kind != "f":
            return given.astype(value.dtype)
        return self._shaken(path, given.astype(np.float64))

    def skipped(self, path: str) -> np.ndarray | None:
        """What stands for the output of a decoder layer that need not be computed; None: it must be."""
        if self.only is None or path == self.only or path not in self.inject:
            return None
        return self._shaken(path, self.inject[path].astype(np.float64))

    def _shaken(self, path: str, value: np.ndarray) -> np.ndarray:
        if not self.shake:
            return value
        return value * (1 + self.shake * np.random.default_rng(list(path.encode())).standard_normal(value.shape))
