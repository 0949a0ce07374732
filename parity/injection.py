"""Live models that can be looked into and handed values from elsewhere, whatever their backend, as NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from parity.backends import Framework
from parity.record import record_model
from parity.trace import Trace

HEAD = "lm_head"  # what logits are called among taps, tied or not


class Tapped(Protocol):
    """What ``parity.bisect`` asks of a model, ours or any other."""

    @property
    def name(self) -> str:
        """What to call it."""
        ...

    @property
    def dtype(self) -> str:
        """What it computes in: ``float32`` or ``bfloat16``."""
        ...

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        *,
        level: str = "layers",
        within: str | None = None,
        inject: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """What it computes, by path, in order of execution; see ``Model.with_taps``. Logits are ``lm_head``."""
        ...


@dataclass(frozen=True)
class Live:
    """A model of ours and where it lives: a ``Tapped``. ``label``: what to call it, where not as its backend."""

    model: Any
    backend: Framework
    label: str | None = None

    @property
    def name(self) -> str:
        """What to call it."""
        return self.label or self.backend.name

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return str(self.model.dtype).removeprefix("torch.")

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        *,
        level: str = "layers",
        within: str | None = None,
        inject: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """What the model computes, by path, float32 or integers; see ``Model.with_taps``. Logits are ``lm_head``."""
        with self.backend.scope():
            logits, taps = self.model.with_taps(**inputs, level=level, within=within, inject=inject)
        found = {path: self.backend.to_numpy(value) for path, value in taps.items()}
        return found | {HEAD: self.backend.to_numpy(logits)}


def rerun(a: Live, b: Live, inputs: Mapping[str, np.ndarray], path: str) -> Trace:
    """What ``b`` computes on ``inputs`` with ``a``'s value at ``path`` (``model.layers.7``) in the place of its own.

    Raises:
        ValueError: ``a`` or ``b`` has no such tap.
    """
    found = a.run(inputs, level="operations", within=path)
    if path not in found:
        raise ValueError(f"{a.name} has no tap {path!r}. Taps with level='operations' name what there is.")
    return record_model(b.model, b.backend, inputs, inject={path: found[path]})
