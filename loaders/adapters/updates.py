"""What an adapter changes, read whole: low-rank updates, and tensors that stand for the model's own."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np

from loaders.adapters.sites import Site


@dataclass(frozen=True)
class LowRank:
    """One update: ``a`` [..., r, in] and ``b`` [..., out, r] float32, of experts with axes of experts and parts before.

    Of an embedding ``in`` is the vocabulary and ``out`` the model's width.
    """

    site: Site
    a: np.ndarray
    b: np.ndarray
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def delta(self, rows: slice = slice(None)) -> np.ndarray:
        """Rows of scaling * B @ A, float32 [..., out, in]."""
        return np.float32(self.scaling) * (self.b[..., rows, :] @ self.a)


@dataclass(frozen=True)
class Adapter:
    """One adapter, all of it on the host.

    Attributes:
        source: where it was read from.
        low_rank: by site, see ``loaders.adapters.sites``.
        whole: tensors that replace the model's own, by name, in the dtypes they were saved in.
        left_out: the base's own tensors that PEFT writes beside an adapted embedding; they were found equal.
        digest: of everything it computes with.
    """

    source: str
    low_rank: dict[str, LowRank]
    whole: dict[str, np.ndarray]
    left_out: tuple[str, ...] = ()
    digest: str = field(default="", compare=False)

    @property
    def rank(self) -> int:
        """The largest of its ranks; 0: it replaces tensors only."""
        return max((update.rank for update in self.low_rank.values()), default=0)

    @functools.cached_property
    def is_nothing(self) -> bool:
        """Whether it changes no output: every update has a half of zeros, as adapters begin."""
        return not self.whole and not any(one.a.any() and one.b.any() for one in self.low_rank.values())
