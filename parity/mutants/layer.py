"""A planted bug in one decoder layer only: what whoever looks for the layer has to find."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from loaders.families import FAMILIES
from parity.mutants import Mutant, Patch
from parity.zoo import ZOO

_running: ContextVar[str | None] = ContextVar("running", default=None)  # path of the decoder layer that runs
_WEIGHTS = "reading:read_params"


class _Either:
    """A module of functions, of which others are looked up inside the layer."""

    def __init__(self, clean: Any, mutant: Any, is_here: Callable[[], bool]) -> None:
        self.clean, self.mutant, self.is_here = clean, mutant, is_here

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mutant if self.is_here() else self.clean, name)


def in_layer(mutant: Mutant, layer: int) -> Mutant:
    """The mutant, planted in decoder layer ``layer`` alone.

    It must be a bug of weights, or of a function or module of functions that the layer uses while it runs: what is
    computed before the layers, or when they are built, is not theirs.
    """
    family = FAMILIES[ZOO[mutant.subject.model].architecture]
    families = {family, "qwen3"} if family == "qwen3_vl" else {family}
    place = re.compile(rf"(.*\.)?layers\.{layer}(\..*)?")

    def is_here() -> bool:
        running = _running.get()
        return running is not None and place.fullmatch(running) is not None

    def there(patch: Patch) -> Patch:
        def make(original: Any, backend: str) -> Any:
            if patch.where == _WEIGHTS:
                return _some_weights(original, patch, backend, place)
            changed = patch.make(original, backend)
            if not callable(original):
                return _Either(original, changed, is_here)
            return lambda *args, **kw: (changed if is_here() else original)(*args, **kw)

        return replace(patch, make=make)

    noting = [Patch(f"{one}:DecoderLayer.CALL", _noting) for one in sorted(families)]
    return replace(mutant, plant=lambda: [*map(there, mutant.plant()), *noting])


def _noting(original: Any, backend: str) -> Any:
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _running.set(self.path)
        try:
            return original(self, *args, **kwargs)
        finally:
            _running.reset(token)

    return run


def _some_weights(original: Any, patch: Patch, backend: str, place: re.Pattern[str]) -> Any:
    def read(*args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        kwargs.pop("staging", None)  # all are held at once here
        clean = dict(original(*args, **kwargs))
        changed = dict(patch.make(lambda *_, **__: clean.items(), backend)(*args, **kwargs))
        yield from ((name, (changed if place.fullmatch(name) else clean)[name]) for name in clean)

    return read
