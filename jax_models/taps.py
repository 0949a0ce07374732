"""Naming intermediate values, so that a trace can be taken of the very computation that serves.

Model code calls ``tap(path, name, value)``, the identity. While ``collect`` is active (at trace time, inside one jit),
values are also kept under their checkpoint module path and can be returned as further outputs; and one that was handed
in from elsewhere takes the place of what was computed, so that what follows can be judged alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

Level = Literal["layers", "modules", "operations"]
LEVELS: tuple[Level, ...] = ("layers", "modules", "operations")  # each holds those before it


@dataclass
class Taps:
    """What is looked at while a model runs, and what was found.

    Attributes:
        level: how deep to look.
        within: only at this module path and below; None: everywhere.
        inject: values that take the place of what is computed, by path, of whatever level.
        found: what was computed, by path, in order of execution.
        met: paths of ``inject`` that were passed. problems: of values that do not fit.
        hides_experts: whether experts ran where nothing in them can be seen.
    """

    level: Level = "layers"
    within: str | None = None
    inject: Mapping[str, jax.Array] = field(default_factory=dict)
    found: dict[str, jax.Array] = field(default_factory=OrderedDict)  # JAX sorts the keys of a plain one
    met: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    hides_experts: bool = False

    def wants(self, path: str, level: Level) -> bool:
        """Whether the value is to be kept."""
        is_there = self.within is None or path == self.within or path.startswith(f"{self.within}.")
        return is_there and LEVELS.index(level) <= LEVELS.index(self.level)

    def given(self, path: str, shape: tuple[int, ...], dtype: Any) -> jax.Array | None:
        """What takes the place of a value of this shape; None: nothing does."""
        if path not in self.inject:
            return None
        self.met.add(path)
        value = self.inject[path]
        if tuple(value.shape) != tuple(shape):
            self.problems.append(f"{path} is {tuple(value.shape)}, expected {tuple(shape)}")
            return None
        return jnp.asarray(value).astype(dtype)

    def check(self) -> None:
        """Raises ValueError: nothing is found where it was looked for, or values fit nothing; lists all of those."""
        unknown = sorted(set(self.inject) - self.met)
        problems = self.problems + [f"{path} is no tap of this run{self._hidden(path)}" for path in unknown]
        if self.within is not None and not self.found:
            there = f"names nothing that this run has at level={self.level!r}"
            raise ValueError(f"within={self.within!r} {there}{self._hidden(self.within)}")
        if problems:
            raise ValueError(f"cannot inject: {'; '.join(problems)}. Taps with level='operations' name what there is.")

    def _hidden(self, path: str) -> str:
        is_inside = self.hides_experts and ".experts." in path
        return ": on a mesh nothing is seen inside of experts, for each device has some" if is_inside else ""


_active: ContextVar[Taps | None] = ContextVar("active", default=None)


def tap(path: str, name: str, value: jax.Array, level: Level = "operations") -> jax.Array:
    """What is to be used for ``value``: itself, unless another was handed in for ``path.name``. Use what it returns.

    Args:
        path: of the module that computes it, as ``name_modules`` gave it.
        name: of the submodule whose output it is, or of a step between; empty: the module's own output.
        value: kept, while somebody collects, as it was computed.
        level: how deep one must look to see it.
    """
    taps = _active.get()
    if taps is None:
        return value
    whole = f"{path}.{name}" if name else path
    if taps.wants(whole, level):
        taps.found[whole] = value
    given = taps.given(whole, value.shape, value.dtype)
    return value if given is None else given


def tap_rows(path: str | None, name: str, value: jax.Array, place_A: jax.Array, lead: tuple[int, ...]) -> jax.Array:
    """``tap`` for rows [A, ...] in an order of their own: row a is number ``place_A[a]`` of those counted by ``lead``.

    What is kept, and what is handed in, is [*lead, ...]. ``path``: None where nothing can be seen, as on a mesh.
    """
    taps = _active.get()
    if taps is None:
        return value
    if path is None:
        taps.hides_experts = True
        return value
    whole = f"{path}.{name}"
    shape = (*lead, *value.shape[1:])
    if taps.wants(whole, "operations"):
        taps.found[whole] = jnp.zeros_like(value).at[place_A].set(value).reshape(shape)
    given = taps.given(whole, shape, value.dtype)
    return value if given is None else given.reshape(value.shape)[place_A]


def name_modules(model: nnx.Module) -> None:
    """Tell every module that has taps its path; once, when everything is in its place."""
    for path, module in nnx.iter_modules(model):
        if hasattr(type(module), "path"):  # its class says that it has taps, or one it is made from
            module.path = ".".join(map(str, path))  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def collect(
    level: Level = "layers", within: str | None = None, inject: Mapping[str, jax.Array] | None = None
) -> Iterator[dict[str, jax.Array]]:
    """The taps passed inside the block, by path, in order; see ``Taps``.

    Raises:
        ValueError: on leaving, no such level, or values of ``inject`` that fit nothing; lists all of them.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}, expected one of {', '.join(LEVELS)}")
    taps = Taps(level, within, inject or {})
    token = _active.set(taps)
    try:
        yield taps.found
    finally:
        _active.reset(token)
    taps.check()
