"""The pointer census: where every tensor lives that a model can reach, and a watch over them that is quick."""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

# values, and things that would lead into half of the interpreter
_LEAVES = (str, bytes, bytearray, int, float, complex, type(None), types.ModuleType, np.ndarray, np.generic)
_LEAVES = (*_LEAVES, type, *weakref.ProxyTypes)
_LEAF_PACKAGES = frozenset({"loaders", "logging", "pathlib", "threading", "triton"})
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_TREE = ("_parameters", "_buffers", "_modules")  # of a module; walked by checkpoint path


@dataclass(frozen=True, slots=True)
class Address:
    """What a captured graph remembers of a tensor."""

    data_ptr: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: torch.Tensor) -> Address:
        """Where ``tensor`` is; one without plain storage is known by which object it is."""
        if tensor.layout is not torch.strided:
            return Address(id(tensor), tuple(tensor.shape), (), tensor.dtype, tensor.device)
        return Address(tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)


def pointer_census(root: Any, name: str = "") -> dict[str, Address]:
    """Address of every tensor that ``root`` reaches, by name.

    Parameters and buffers by module path, one that has two under both; then what plain attributes, slots, class
    attributes, containers, hooks, bound methods, partials, closures and defaults hold, named by the way there:
    ``kernel.workspace['x'][2]``, ``model.norm._forward_hooks[3].<closure w>``. A container that is held in two places
    is walked once. Not entered: strings, arrays, modules of Python, what ``loaders`` made, and an object whose class
    says ``is_outside_census``. No property is called.

    Args:
        root: a module, or any object, container or function.
        name: what to call it.
    """
    return {place: Address.of(tensor) for place, tensor in tensors_of(root, name)}


def tensors_of(root: Any, name: str = "") -> list[tuple[str, torch.Tensor]]:
    """The tensors of which ``pointer_census`` gives the addresses."""
    return _Walk(root, name).tensors


def moved(before: dict[str, Address], after: dict[str, Address]) -> list[str]:
    """Names whose address differs between two censuses, vanished and new ones included."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


class Watch:
    """A census of ``root`` to compare with, again and again.

    ``moved`` looks at every place where a tensor was found, and at the places on the way there: 60 ns each, so that it
    can be done before every replay. Only where one of them holds something else is the census taken anew. What came
    new in a place that held no tensor is seen by ``moved_or_new`` alone.
    """

    def __init__(self, root: Any, name: str = "") -> None:
        self._root = weakref.ref(root) if isinstance(root, nn.Module) else lambda: root  # a model may go when it likes
        self._name = name
        self._look()

    def moved(self) -> list[str]:
        """Names of the tensors that are no longer where they were."""
        return [] if self._is_untouched() else self.moved_or_new()

    def moved_or_new(self) -> list[str]:
        """Likewise by a whole census: also names that were not there."""
        names = moved(self.census, pointer_census(self._root(), self._name))
        if not names and not self._is_untouched():
            self._look()  # another object, with the same tensors
        return names

    def _look(self) -> None:
        walk = _Walk(self._root(), self._name)
        self.census = {place: Address.of(tensor) for place, tensor in walk.tensors}
        dense = [tensor for _, tensor in walk.tensors if tensor.layout is torch.strided]
        self._tensors, self._pointers = dense, [tensor.data_ptr() for tensor in dense]
        self._edges = walk.edges()

    def _is_untouched(self) -> bool:
        try:
            if not all(look(key) is child for look, key, child in self._edges):
                return False
        except (LookupError, AttributeError, ValueError):  # the place is gone, or a closure's cell is empty
            return False
        return [tensor.data_ptr() for tensor in self._tensors] == self._pointers


Look = Callable[[Any], Any]
Edge = tuple[Look, Any, Any]  # how to look into a holder, where, and what was found there
Child = tuple[str, Look | None, Any, Any]  # suffix of the name, how to look there again, where, and what is there


@dataclass(slots=True, eq=False)
class _Node:
    """An object on the way to a tensor."""

    name: str
    value: Any
    parent: _Node | None
    edge: Edge | None  # None: it cannot be exchanged in place, as in a tuple
    leads_to_tensor: bool = False


class _Walk:
    """Everything reachable from a root, each container once: first the module tree, then all other ways."""

    def __init__(self, root: Any, name: str) -> None:
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self._nodes: dict[int, _Node] = {}  # by id; they also keep the ids theirs
        self._leaf_kinds: dict[type, bool] = {}
        self._members: dict[type, list[tuple[type, str, Any]]] = {}
        self._met_again: list[tuple[_Node, int]] = []
        self._fruitful: list[_Node] = []
        self._pending = [_Node(name, root, None, None)]
        while self._pending:
            self._visit(self._pending.pop())

    def edges(self) -> list[Edge]:
        """The places to look at."""
        for node, other in self._met_again:
            if self._nodes[other].leads_to_tensor:
                self._mark(node)
        return [node.edge for node in self._fruitful if node.edge is not None]

    def _mark(self, node: _Node | None) -> None:
        while node is not None and not node.leads_to_tensor:
            node.leads_to_tensor = True
            self._fruitful.append(node)
            node = node.parent

    def _visit(self, node: _Node) -> None:
        value = node.value
        if isinstance(value, torch.Tensor):
            self.tensors.append((node.name, value))
            self._mark(node)
            if not (vars(value) and self._is_first(node)):  # tensors may carry attributes: loaders, scales
                return
        elif isinstance(value, nn.Module):
            if id(value) not in self._nodes:
                self._tree(node)
            return
        elif self._is_leaf(value) or not self._is_first(node):
            return
        self._push(node, self._children(value))

    def _is_first(self, node: _Node) -> bool:
        if id(node.value) in self._nodes:
            self._met_again.append((node, id(node.value)))
            return False
        self._nodes[id(node.value)] = node
        return True

    def _tree(self, root: _Node) -> None:
        """All modules below ``root`` under all their paths; everything else they hold is left for later."""
        paths = [(root, frozenset[int]())]
        while paths:
            node, above = paths.pop()
            module = node.value
            if id(module) in above:
                continue
            if id(module) not in self._nodes:
                self._nodes[id(module)] = node
                self._push(node, (child for child in self._children(module) if child[2] not in _TREE))
            for holder in (module._parameters, module._buffers):
                self._push(node, ((f".{leaf}", holder.__getitem__, leaf, held) for leaf, held in holder.items()))
            for leaf, child in module._modules.items():
                if child is not None:
                    edge = (module._modules.__getitem__, leaf, child)
                    paths.append((_Node(_joined(node.name, f".{leaf}"), child, node, edge), above | {id(module)}))

    def _push(self, parent: _Node, children: Iterable[Child]) -> None:
        for suffix, look, key, child in children:
            if not self._is_leaf(child) and not (isinstance(child, _CONTAINERS) and not child):
                edge = None if look is None else (look, key, child)
                self._pending.append(_Node(_joined(parent.name, suffix), child, parent, edge))

    def _is_leaf(self, value: Any) -> bool:
        kind = type(value)
        found = self._leaf_kinds.get(kind)
        if found is None:
            found = self._leaf_kinds[kind] = (
                issubclass(kind, _LEAVES)
                or kind.__module__.partition(".")[0] in _LEAF_PACKAGES
                or getattr(kind, "is_outside_census", False)
            )
        return found

    def _children(self, value: Any) -> Iterator[Child]:
        """What an object holds: as the container or function it is, in its dictionary and slots, and in its classes."""
        yield from _contents(value)
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            for key, child in list(own.items()):
                yield f".{key}", own.__getitem__, key, child
        kind = type(value)
        if kind not in self._members:
            self._members[kind] = list(_members(kind))
        for owner, key, member in self._members[kind]:
            if not isinstance(member, types.MemberDescriptorType):
                yield f".<class {owner.__name__}>.{key}", vars(owner).__getitem__, key, member
                continue
            with contextlib.suppress(AttributeError):  # an empty slot
                yield f".{key}", functools.partial(_in_slot, value), member, _in_slot(value, member)


def _joined(name: str, suffix: str) -> str:
    return name + suffix if name else suffix.removeprefix(".")


def _contents(value: Any) -> Iterator[Child]:
    """Of containers, functions and what binds them."""
    if isinstance(value, dict | types.MappingProxyType):
        for key, child in list(value.items()):
            yield (
                f"[{key!r}]" if isinstance(key, str | int) else f"[{type(key).__name__}]",
                value.__getitem__,
                key,
                child,
            )
    elif isinstance(value, list | deque | tuple):
        for index, child in enumerate(value):
            yield f"[{index}]", None if isinstance(value, tuple) else value.__getitem__, index, child
    elif isinstance(value, set | frozenset):
        for index, child in enumerate(value):
            yield f"{{{index}}}", None, index, child
    elif isinstance(value, functools.partial):
        for key in ("func", "args", "keywords"):
            yield f".{key}", None, key, getattr(value, key)
    elif isinstance(value, types.MethodType | types.BuiltinMethodType):
        yield ".__self__", None, "__self__", value.__self__
        if isinstance(value, types.MethodType):
            yield ".__func__", None, "__func__", value.__func__
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value)


def _of_function(function: types.FunctionType) -> Iterator[Child]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f".<closure {name}>", functools.partial(_in_cell, cell), name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for index, child in enumerate(function.__defaults__ or ()):
        yield f".<default {index}>", None, index, child
    for key, child in (function.__kwdefaults__ or {}).items():
        yield f".<default {key}>", None, key, child


def _in_cell(cell: types.CellType, _: str) -> Any:
    return cell.cell_contents


def _members(kind: type) -> Iterator[tuple[type, str, Any]]:
    """Slots, and class attributes that are data."""
    for owner in kind.__mro__:
        if owner.__module__.partition(".")[0] in ("builtins", "torch", "functools", "collections"):
            continue
        for key, member in vars(owner).items():
            is_data = isinstance(member, torch.Tensor | dict | list | tuple) and not key.startswith("__")
            if is_data or isinstance(member, types.MemberDescriptorType):
                yield owner, key, member


def _in_slot(value: Any, member: types.MemberDescriptorType) -> Any:
    return member.__get__(value)
