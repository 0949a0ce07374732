"""Layers with adapters: each stands where its base stood and is it, under the same names. Twin of the torch file.

Every adapter has a slot; ``active_rows`` says which slot each row of a batch is of. What an adapter adds is computed in
float32 and added to the base's output in float32, rounded once to its dtype. Where it adds nothing (a row of no
adapter, an update of zeros) the base's output stays as it is, bit for bit.

Wrappers are put in place inside a program, after weights and module were merged: the tree of the weights knows nothing
of them, and what they hold is an argument of the program.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_models.jvp import with_jvp_of
from jax_models.taps import tap

_rows: ContextVar[jax.Array | None] = ContextVar("rows", default=None)
_EXACT = jax.lax.Precision.HIGHEST  # float32 means float32, whatever the model computes in


@contextmanager
def active_rows(slot_B: jax.Array | None) -> Iterator[None]:
    """Inside, row b runs with the adapter in slot ``slot_B[b]``, -1 for none; None: the base alone runs."""
    token = _rows.set(slot_B)
    try:
        yield
    finally:
        _rows.reset(token)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stacks:
    """Low-rank updates of one module, slot by slot; slots and ranks that are not used are zero.

    Attributes:
        a: float32 [slots, ..., r, in]; of an embedding [slots, V, r].
        b: float32 [slots, ..., out, r].
        scaling: float32 [slots].
    """

    a: jax.Array
    b: jax.Array
    scaling: jax.Array

    def delta(self, x: jax.Array, slot: int) -> jax.Array:
        """What the adapter in ``slot`` adds, float32."""
        return _linear(_linear(x.astype(jnp.float32), self.a[slot]), self.b[slot]) * self.scaling[slot]

    def looked_up(self, ids_BT: jax.Array, slot: int) -> jax.Array:
        """What it adds to an embedding, float32 [B, T, D]; nothing to an id beyond its table, as placeholders are."""
        found_BTR = self.a.at[slot, ids_BT].get(mode="fill", fill_value=0.0)  # on a TPU a[slot] would be a copy
        found_BTR = jnp.where((ids_BT >= 0)[..., None], found_BTR, 0.0)  # a negative id counts from the end
        return _linear(found_BTR, self.b[slot]) * self.scaling[slot]


def of_rows(is_chosen_B: jax.Array, value: jax.Array, other: jax.Array) -> jax.Array:
    """``value`` in the rows that are chosen, ``other`` elsewhere."""
    return jnp.where(is_chosen_B.reshape(-1, *(1,) * (value.ndim - 1)), value, other)


def added(y: jax.Array, deltas: Sequence[jax.Array], slot_B: jax.Array) -> jax.Array:
    """``y`` with each row's delta, in the dtype of ``y``; bit for bit the same where a delta is zero."""
    delta = jnp.zeros_like(deltas[0])
    for slot, one in enumerate(deltas):
        delta = of_rows(slot_B == slot, one, delta)
    return _sum(y, delta)


def _plain_sum(y: jax.Array, delta: jax.Array) -> jax.Array:
    return (y.astype(jnp.float32) + delta).astype(y.dtype)


def _sum_where_any(y: jax.Array, delta: jax.Array) -> jax.Array:
    return jnp.where(delta != 0, _plain_sum(y, delta), y)  # -0 + 0 would be 0


_sum = with_jvp_of(_plain_sum, _sum_where_any)  # an update that is still zero has a gradient


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertUpdates:
    """What adapters add to the products of a layer's experts.

    ``slot_B``: slot of each row. Both methods take rows sorted by expert: float32 outputs and inputs of a product, how
    to multiply rows by a stack of matrices, one for each expert, and the slot of each row.
    """

    gate_up: Stacks | None
    down: Stacks | None
    slot_B: jax.Array

    def slots(self, order_A: jax.Array, lead: tuple[int, ...]) -> jax.Array:
        """Slot of each assignment: rows' assignments, [B, T, X] of them, one after the other, then in this order."""
        return self.slot_B[order_A // math.prod(lead[1:])]

    def first(
        self,
        y_AF: jax.Array,
        x_AD: jax.Array,
        by_group: Callable[[jax.Array, jax.Array], jax.Array],
        slot_A: jax.Array,
    ) -> jax.Array:
        """Gate and up, one after the other along the last axis."""
        if self.gate_up is None:
            return y_AF
        added_parts = []
        for part, y_AM in enumerate(jnp.split(y_AF, 2, axis=-1)):
            of_part = Stacks(self.gate_up.a[:, :, part], self.gate_up.b[:, :, part], self.gate_up.scaling)
            added_parts.append(_by_expert(y_AM, x_AD, of_part, by_group, slot_A))
        return jnp.concatenate(added_parts, axis=-1)

    def second(
        self,
        y_AD: jax.Array,
        x_AM: jax.Array,
        by_group: Callable[[jax.Array, jax.Array], jax.Array],
        slot_A: jax.Array,
    ) -> jax.Array:
        """Down."""
        return y_AD if self.down is None else _by_expert(y_AD, x_AM, self.down, by_group, slot_A)


def _by_expert(
    y: jax.Array,
    x: jax.Array,
    stacks: Stacks,
    by_group: Callable[[jax.Array, jax.Array], jax.Array],
    slot_A: jax.Array,
) -> jax.Array:
    x32, deltas = x.astype(jnp.float32), []
    for slot in range(len(stacks.a)):
        deltas.append(by_group(by_group(x32, stacks.a[slot]), stacks.b[slot]) * stacks.scaling[slot])
    return added(y, deltas, slot_A)


class Wrapper:
    """A layer in another's place. Whatever one holds or is given, both are: attributes, parameters, methods.

    ``base_layer`` is the layer itself. ``dir`` and ``hasattr`` see what it has, and what is here.
    """

    __slots__ = ("base_layer",)

    def __init__(self, base_layer: Any) -> None:
        self.base_layer = base_layer

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.base_layer)})

    def __getattr__(self, name: str) -> Any:
        if name == "base_layer":  # not set yet, while one is copied
            raise AttributeError(name)
        return getattr(self.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        is_own = any(name in getattr(kind, "__slots__", ()) for kind in type(self).__mro__)
        if is_own:
            object.__setattr__(self, name, value)
        else:
            setattr(self.base_layer, name, value)


class LinearWithLoRA(Wrapper):
    """A linear layer, plain or quantised, or a head."""

    __slots__ = ("lora",)

    def __init__(self, base_layer: Any, lora: Stacks) -> None:
        super().__init__(base_layer)
        self.lora = lora

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._added(self.base_layer(x), x)

    def project(self, x: jax.Array) -> jax.Array:
        """x Wᵀ, float32: what a head is asked for."""
        return self._added(self.base_layer.project(x), x)

    def _added(self, y: jax.Array, x: jax.Array) -> jax.Array:
        slot_B = _rows.get()
        if slot_B is None:
            return y
        return added(y, [self.lora.delta(x, slot) for slot in range(len(self.lora.a))], slot_B)


class VocabParallelEmbeddingWithLoRA(Wrapper):
    """An embedding. Where it is the head too, an update of either is of that side alone, as in PEFT.

    ``lookup`` and ``head`` are None where that side has no update, as of a table that adapters bring whole.
    """

    __slots__ = ("head", "lookup")

    def __init__(self, base_layer: Any, lookup: Stacks | None, head: Stacks | None) -> None:
        super().__init__(base_layer)
        self.lookup = lookup
        self.head = head

    def __call__(self, ids_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows of the table; a placeholder's id is clamped for the base, and seen as it is by the adapters."""
        y_BTD = self.base_layer(jnp.clip(ids_BT, 0, self.num_embeddings - 1), dtype)
        slot_B, lookup = _rows.get(), self.lookup
        if slot_B is None or lookup is None:
            return y_BTD
        return added(y_BTD, [lookup.looked_up(ids_BT, slot) for slot in range(len(lookup.a))], slot_B)

    def project(self, x: jax.Array) -> jax.Array:
        """x Wᵀ, float32: what a head is asked for."""
        y, slot_B, head = self.base_layer.project(x), _rows.get(), self.head
        if slot_B is None or head is None:
            return y
        return added(y, [head.delta(x, slot) for slot in range(len(head.a))], slot_B)


class RouterWithLoRA(Wrapper):
    """A router. What is added to its scores changes which experts are chosen."""

    __slots__ = ("lora",)

    def __init__(self, base_layer: Any, lora: Stacks) -> None:
        super().__init__(base_layer)
        self.lora = lora

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As the base's: weights, float32 [B, T, X], and experts, int32 [B, T, X]."""
        return self.choose(tap(self.path, "logits", self.logits(x_BTD), "modules"))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """A score for every expert, float32 [B, T, E]."""
        logits_BTE, slot_B = self.base_layer.logits(x_BTD), _rows.get()
        if slot_B is None:
            return logits_BTE
        return added(logits_BTE, [self.lora.delta(x_BTD, slot) for slot in range(len(self.lora.a))], slot_B)


class ExpertsWithLoRA(Wrapper):
    """All experts of a layer, plain or quantised."""

    __slots__ = ("down", "gate_up")

    def __init__(self, base_layer: Any, gate_up: Stacks | None, down: Stacks | None) -> None:
        super().__init__(base_layer)
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x_BTD: jax.Array, weights_BTX: jax.Array, experts_BTX: jax.Array) -> jax.Array:
        """Weighted sum of the chosen experts, in float32, returned in the dtype of x."""
        slot_B = _rows.get()
        if slot_B is None:
            return self.base_layer(x_BTD, weights_BTX, experts_BTX)
        updates = ExpertUpdates(self.gate_up, self.down, slot_B)
        return self.base_layer(x_BTD, weights_BTX, experts_BTX, updates)


class ModuleWithCopies(Wrapper):
    """Any layer some adapters bring whole (``modules_to_save``): a row of such an adapter runs through its copy.

    Attributes:
        copies: layers like the base, each with tensors of its own, by place.
        places: int32 [slots + 1], which of them a slot has, -1 for none; the last is of rows without adapter.
        methods: what a copy stands for, of those the base has; a tied table's is the lookup, or the head, alone.
    """

    __slots__ = ("copies", "methods", "places")

    def __init__(self, base_layer: Any, copies: Sequence[Any], places: jax.Array, methods: frozenset[str]) -> None:
        super().__init__(base_layer)
        self.copies = list(copies)
        self.places = places
        self.methods = methods

    def __call__(self, *args: Any) -> Any:
        return self._chosen("__call__", *args)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return functools.partial(self._chosen, name) if name in self.methods else found

    def _chosen(self, method: str, *args: Any) -> Any:
        out, slot_B = getattr(self.base_layer, method)(*args), _rows.get()
        if slot_B is None or method not in self.methods:
            return out
        place_B = self.places[slot_B]  # of -1: the last
        for place, one in enumerate(self.copies):
            theirs = getattr(one, method)(*args)
            out = jax.tree.map(lambda a, b: of_rows(place_B == place, a, b), theirs, out)  # noqa: B023 (at once)
        return out


class RouterWithCopies(ModuleWithCopies):
    """A router that some adapters bring whole: rows differ in their scores, and are chosen from alike."""

    __slots__ = ()

    def __call__(self, *args: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As the base's: weights, float32 [B, T, X], and experts, integers [B, T, X]."""
        return self.choose(tap(self.path, "logits", self.logits(*args), "modules"))


def unwrapped(module: Any) -> Any:
    """The layer itself, whatever stands in its place."""
    while isinstance(module, Wrapper):
        module = module.base_layer
    return module


def _linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("...i,oi->...o", x, weight, precision=_EXACT, preferred_element_type=jnp.float32)
