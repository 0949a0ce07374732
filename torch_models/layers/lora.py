"""Layers with adapters: each stands where its base stood and is it, under the same names. Twin of the JAX file.

Every adapter has a slot; ``active_rows`` says which slot each row of a batch is of. What an adapter adds is computed in
float32 and added to the base's output in float32, rounded once to its dtype. Where it adds nothing (a row of no
adapter, an update of zeros) the base's output stays as it is, bit for bit.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from torch_models.layers.linear import Join
from torch_models.taps import tap

_rows: ContextVar[torch.Tensor | None] = ContextVar("rows", default=None)


@contextmanager
def active_rows(slot_B: torch.Tensor | None) -> Iterator[None]:
    """Inside, row b runs with the adapter in slot ``slot_B[b]``, -1 for none; None: the base alone runs."""
    token = _rows.set(slot_B)
    try:
        yield
    finally:
        _rows.reset(token)


@dataclass(frozen=True)
class Stacks:
    """Low-rank updates of one module, slot by slot; slots and ranks that are not used are zero.

    On a mesh inputs and outputs are those that are here of the weight; of a table that is looked up all are.

    Attributes:
        a: float32 [slots, ..., r, in]; of an embedding [slots, V, r].
        b: float32 [slots, ..., out, r].
        scaling: float32 [slots].
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: torch.Tensor

    def delta(self, x: torch.Tensor, slot: int) -> torch.Tensor:
        """What the adapter in ``slot`` adds, float32."""
        return F.linear(F.linear(x.float(), self.a[slot]), self.b[slot]) * self.scaling[slot]

    def looked_up(self, ids_BT: torch.Tensor, slot: int) -> torch.Tensor:
        """What it adds to an embedding, float32 [B, T, D]; nothing to an id beyond its table, as placeholders are."""
        last = self.a.shape[1] - 1
        found_BTR = F.embedding(ids_BT.clamp(0, last), self.a[slot])
        found_BTR = torch.where(((ids_BT >= 0) & (ids_BT <= last))[..., None], found_BTR, 0.0)
        return F.linear(found_BTR, self.b[slot]) * self.scaling[slot]


def of_rows(is_chosen_B: torch.Tensor, value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``value`` in the rows that are chosen, ``other`` elsewhere."""
    return torch.where(is_chosen_B.view(-1, *(1,) * (value.ndim - 1)), value, other)


def added(
    y: torch.Tensor, deltas: Sequence[torch.Tensor], slot_B: torch.Tensor, gathered: Join | None = None
) -> torch.Tensor:
    """``y`` with each row's delta, in the dtype of ``y``; bit for bit the same where a delta is zero.

    ``gathered``: on a mesh, what puts the deltas of all outputs together, where ``y`` has all.
    """
    delta = torch.zeros_like(deltas[0])
    for slot, one in enumerate(deltas):
        delta = of_rows(slot_B == slot, one, delta)
    delta = delta if gathered is None else gathered(delta)
    return torch.where(delta != 0, (y.float() + delta).to(y.dtype), y)  # -0 + 0 would be 0


@dataclass(frozen=True)
class ExpertUpdates:
    """What adapters add to the products of a layer's experts.

    ``slot_U``: slot of each token's row. Both methods take outputs and inputs of some experts' product, which expert
    each is of (one, one for each row, or all of them along a first axis), and the token of each row.
    """

    gate_up: Stacks | None
    down: Stacks | None
    slot_U: torch.Tensor

    def first(
        self, y_AF: torch.Tensor, x_AD: torch.Tensor, expert: int | slice | torch.Tensor, token_A: torch.Tensor
    ) -> torch.Tensor:
        """Gate and up, one after the other along the last axis."""
        return torch.cat(self.parts(y_AF.chunk(2, dim=-1), x_AD, expert, token_A), dim=-1)

    def parts(
        self,
        parts: Sequence[torch.Tensor],
        x_AD: torch.Tensor,
        expert: int | slice | torch.Tensor,
        token_A: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Gate and up, each by itself: activations of tensors that lie otherwise in memory may differ in a bit."""
        if self.gate_up is None:
            return list(parts)
        return [self._added(y, x_AD, self.gate_up, (expert, part), token_A) for part, y in enumerate(parts)]

    def second(
        self, y_AD: torch.Tensor, x_AM: torch.Tensor, expert: int | slice | torch.Tensor, token_A: torch.Tensor
    ) -> torch.Tensor:
        """Down."""
        return y_AD if self.down is None else self._added(y_AD, x_AM, self.down, (expert,), token_A)

    def _added(
        self, y: torch.Tensor, x: torch.Tensor, stacks: Stacks, place: tuple[Any, ...], token_A: torch.Tensor
    ) -> torch.Tensor:
        x32, slot_A1 = x.float(), self.slot_U[token_A][:, None]
        delta = torch.zeros_like(y, dtype=torch.float32)
        for slot in range(len(stacks.a)):
            a, b = stacks.a[slot][place], stacks.b[slot][place]
            if isinstance(place[0], torch.Tensor):  # a matrix for each row
                one = torch.bmm(b, torch.bmm(a, x32[..., None]))[..., 0]
            else:
                one = x32 @ a.mT @ b.mT
            delta = torch.where(slot_A1 == slot, one * stacks.scaling[slot], delta)
        return torch.where(delta != 0, (y.float() + delta).to(y.dtype), y)


class Wrapper(nn.Module):
    """A layer in another's place. They have one dictionary of attributes: whatever one holds or is given, both are.

    So names, parameters, buffers and hooks are the base's, and nothing is registered twice. ``base_layer`` is the layer
    itself; methods that are not here are its own. ``dir`` and ``hasattr`` see what the base has, and what is here.
    """

    __slots__ = ("_held",)

    def __init__(self, base_layer: nn.Module) -> None:
        object.__setattr__(self, "__dict__", base_layer.__dict__)
        object.__setattr__(self, "_held", Held(base_layer))

    @property
    def base_layer(self) -> Any:
        """What this stands for."""
        return self._held.module

    def __deepcopy__(self, memo: dict[int, Any]) -> Wrapper:
        """A wrapper of a copy of the base; they have one dictionary too."""
        other = memo[id(self)] = type(self).__new__(type(self))
        Wrapper.__init__(other, copy.deepcopy(self.base_layer, memo))
        for name in type(self).__slots__:
            object.__setattr__(other, name, copy.deepcopy(getattr(self, name), memo))
        return other

    def __reduce__(self) -> Any:
        return _wrapped, (type(self), self.base_layer, {name: getattr(self, name) for name in type(self).__slots__})

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.base_layer)})

    def __getattr__(self, name: str) -> Any:
        for holder in ("_parameters", "_buffers", "_modules"):
            if name in self.__dict__[holder]:
                return self.__dict__[holder][name]
        return getattr(self._held.module, name)


def _wrapped(kind: type[Wrapper], base_layer: nn.Module, slots: Mapping[str, Any]) -> Wrapper:
    """A wrapper that was pickled."""
    found = kind.__new__(kind)
    Wrapper.__init__(found, base_layer)
    for name, value in slots.items():
        object.__setattr__(found, name, value)
    return found


@dataclass(frozen=True)
class Held:
    """A module that is no part of the one that holds it: the census finds what it has where it stands."""

    is_outside_census = True
    module: Any


class LinearWithLoRA(Wrapper):
    """A linear layer, plain or quantised, or a head."""

    __slots__ = ("lora",)

    def __init__(self, base_layer: nn.Module, lora: Stacks) -> None:
        super().__init__(base_layer)
        object.__setattr__(self, "lora", lora)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._added(self.base_layer.forward(x), x)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ, float32: what a head is asked for."""
        return self._added(self.base_layer.project(x), x, self.gathered)

    def _added(self, y: torch.Tensor, x: torch.Tensor, gathered: Join | None = None) -> torch.Tensor:
        slot_B, lora = _rows.get(), self.lora
        if slot_B is None:
            return y
        if self.summed is None:
            return added(y, [lora.delta(x, slot) for slot in range(len(lora.a))], slot_B, gathered)
        inner = self.summed(torch.stack([F.linear(x.float(), a) for a in lora.a]))  # of all slots at once, and narrow
        deltas = [F.linear(one, b) * by for one, b, by in zip(inner, lora.b, lora.scaling, strict=True)]
        return added(y, deltas, slot_B)


class VocabParallelEmbeddingWithLoRA(Wrapper):
    """An embedding. Where it is the head too, an update of either is of that side alone, as in PEFT.

    ``lookup`` and ``head`` are None where that side has no update, as of a table that adapters bring whole.
    """

    __slots__ = ("head", "lookup")

    def __init__(self, base_layer: nn.Module, lookup: Stacks | None, head: Stacks | None) -> None:
        super().__init__(base_layer)
        object.__setattr__(self, "lookup", lookup)
        object.__setattr__(self, "head", head)

    def forward(self, ids_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the table; a placeholder's id is clamped for the base, and seen as it is by the adapters."""
        y_BTD = self.base_layer.forward(ids_BT.clamp(0, self.num_embeddings - 1), dtype)
        slot_B, lookup = _rows.get(), self.lookup
        if slot_B is None or lookup is None:
            return y_BTD
        return added(y_BTD, [lookup.looked_up(ids_BT, slot) for slot in range(len(lookup.a))], slot_B)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ, float32: what a head is asked for."""
        y, slot_B, head = self.base_layer.project(x), _rows.get(), self.head
        if slot_B is None or head is None:
            return y
        return added(y, [head.delta(x, slot) for slot in range(len(head.a))], slot_B, self.gathered)


class RouterWithLoRA(Wrapper):
    """A router. What is added to its scores changes which experts are chosen."""

    __slots__ = ("lora",)

    def __init__(self, base_layer: nn.Module, lora: Stacks) -> None:
        super().__init__(base_layer)
        object.__setattr__(self, "lora", lora)

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As the base's: weights, float32 [B, T, X], and experts, int64 [B, T, X]."""
        return self.choose(tap(self.path, "logits", self.logits(x_BTD), "modules"))

    def logits(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """A score for every expert, float32 [B, T, E]."""
        logits_BTE, slot_B = self.base_layer.logits(x_BTD), _rows.get()
        if slot_B is None:
            return logits_BTE
        return added(logits_BTE, [self.lora.delta(x_BTD, slot) for slot in range(len(self.lora.a))], slot_B)


class ExpertsWithLoRA(Wrapper):
    """All experts of a layer, plain or quantised."""

    __slots__ = ("down", "gate_up")

    def __init__(self, base_layer: nn.Module, gate_up: Stacks | None, down: Stacks | None) -> None:
        super().__init__(base_layer)
        object.__setattr__(self, "gate_up", gate_up)
        object.__setattr__(self, "down", down)

    def forward(self, x_BTD: torch.Tensor, weights_BTX: torch.Tensor, experts_BTX: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the chosen experts, in float32, returned in the dtype of x."""
        slot_B = _rows.get()
        if slot_B is None:
            return self.base_layer.forward(x_BTD, weights_BTX, experts_BTX)
        updates = ExpertUpdates(self.gate_up, self.down, slot_B.repeat_interleave(x_BTD.shape[1]))
        return self.base_layer.forward(x_BTD, weights_BTX, experts_BTX, updates)


class ModuleWithCopies(Wrapper):
    """Any layer some adapters bring whole (``modules_to_save``): a row of such an adapter runs through its copy.

    Attributes:
        copies: layers like the base, each with tensors of its own, by place.
        places: int64 [slots + 1], which of them a slot has, -1 for none; the last is of rows without adapter.
        methods: what a copy stands for, of those the base has; a tied table's is the lookup, or the head, alone.
    """

    __slots__ = ("copies", "methods", "places")

    def __init__(
        self, base_layer: nn.Module, copies: Sequence[nn.Module], places: torch.Tensor, methods: frozenset[str]
    ) -> None:
        super().__init__(base_layer)
        object.__setattr__(self, "copies", [Copy(one) for one in copies])
        object.__setattr__(self, "places", places)
        object.__setattr__(self, "methods", methods)

    def forward(self, *args: Any) -> Any:
        return self._chosen("forward", *args)

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return functools.partial(self._chosen, name) if name in self.methods else found

    def _chosen(self, method: str, *args: Any) -> Any:
        out, slot_B = getattr(self.base_layer, method)(*args), _rows.get()
        if slot_B is None or method not in self.methods:
            return out
        place_B = self.places[slot_B]
        for place, one in enumerate(self.copies):
            theirs = getattr(one.module, method)(*args)
            pairs = zip(theirs, out, strict=True) if isinstance(out, tuple) else [(theirs, out)]
            chosen = tuple(of_rows(place_B == place, a, b) for a, b in pairs)
            out = chosen if isinstance(out, tuple) else chosen[0]
        return out


class RouterWithCopies(ModuleWithCopies):
    """A router that some adapters bring whole: rows differ in their scores, and are chosen from alike."""

    __slots__ = ()

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As the base's: weights, float32 [B, T, X], and experts, integers [B, T, X]."""
        return self.choose(tap(self.path, "logits", self.logits(*args), "modules"))


@dataclass(frozen=True)
class Copy:
    """A copy of a layer, which the census does see."""

    module: Any


def unwrapped(module: nn.Module) -> nn.Module:
    """The layer itself, whatever stands in its place."""
    while isinstance(module, Wrapper):
        module = module.base_layer
    return module
