"""A weight that is wrong by a little, for as long as one pass of an oracle: what a run has to be able to see."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Fault:
    """One module's weight, wrong.

    Attributes:
        module: by its checkpoint name, ``model.layers.3.self_attn.o_proj``; ``*`` stands for every expert's number.
        size: relative; 0.01 is one percent.
        kind: ``scale`` multiplies by 1 + size, ``noise`` adds independent normal numbers of size times the weight's
            root mean square, which no norm behind it can take out again.
        origin: what the weight is counted from: 1 where a norm computes with 1 + w.
    """

    module: str
    size: float
    kind: Literal["scale", "noise"]
    origin: float = 0.0

    def applied(self, name: str, values: np.ndarray) -> np.ndarray:
        """``values`` of the tensor or module ``name`` as they are with this fault: float64 where it hits."""
        if not re.fullmatch(re.escape(self.module).replace(r"\*", r"\d+") + r"(\.weight)?", name):
            return values
        wide = values.astype(np.float64) + self.origin
        if self.kind == "scale":
            return wide * (1.0 + self.size) - self.origin
        rng = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))
        noise = self.size * np.sqrt(np.mean(wide * wide)) * rng.standard_normal(wide.shape)
        return wide + noise - self.origin
