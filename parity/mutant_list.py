"""Mutants of what a model computes: attention, MLP and experts, head. Most can be planted on either backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from loaders import CheckpointError
from parity.mutant_bench import Subject, decode, forward, loaded_bits
from parity.mutants import Kind, Mutant, Patch
from parity.zoo import ZOO

BOTH = ("torch", "jax")
_TWO = (("num_hidden_layers", 2),)
DENSE = Subject("qwen3", _TWO)
TIED = Subject("qwen3-tied", _TWO)
BIAS = Subject("qwen3-bias", _TWO)
SLIDING = Subject("qwen3-sliding", (*_TWO, ("layer_types", ("sliding_attention", "full_attention"))))
YARN = Subject("qwen3-yarn", _TWO)
DEEP = Subject("qwen3-deep")  # layer 10 sorts before layer 2 as text
MOE = Subject("qwen3-moe", _TWO)
MOE_RAW = Subject("qwen3-moe-nonorm", _TWO)
MANY = Subject("qwen3-moe", (*_TWO, ("num_experts", 12)))
SQUARE = Subject("qwen3", (*_TWO, ("hidden_size", 60)))  # o_proj is 60 x 60
HALF = Subject("qwen3", _TWO, "BF16")


class Instead:
    """A module with some of its names replaced."""

    def __init__(self, original: Any, **changes: Any) -> None:
        self.original = original
        self.__dict__.update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


def xp(backend: str) -> Any:
    """The array module; what is used here is spelled alike in both."""
    return import_module("torch" if backend == "torch" else "jax.numpy")


def wrapped(where: str, change: Callable[..., Any]) -> Callable[[], list[Patch]]:
    """``change(original, *arguments)`` stands in for the function at ``where``."""

    def make(original: Any, backend: str) -> Any:
        def mutant(*args: Any, **kwargs: Any) -> Any:
            return change(original, *args, **kwargs)

        return mutant

    return lambda: [Patch(where, make)]


def at_backend(where: str, change: Callable[..., Any]) -> Callable[[], list[Patch]]:
    """As ``wrapped``, with the backend's array module for a second argument."""
    return lambda: [
        Patch(where, lambda original, backend: lambda *args, **kw: change(original, xp(backend), *args, **kw))
    ]


def weights(edit: Callable[[dict[str, Any], Any], dict[str, Any]]) -> Callable[[], list[Patch]]:
    """Every load gives other weights: ``edit(parameters by name, array module)`` returns those that change."""

    def make(original: Any, backend: str) -> Any:
        def read(*args: Any, **kwargs: Any) -> Any:
            found, report = original(*args, **kwargs)
            if backend == "torch":
                return found | {name: w.clone().contiguous() for name, w in edit(found, xp(backend)).items()}, report
            from flax import traverse_util

            flat = traverse_util.flatten_dict(found, sep=".")
            return traverse_util.unflatten_dict(flat | edit(flat, xp(backend)), sep="."), report

        return read

    return lambda: [Patch("load:read_weights", make)]


def each(part: str, change: Callable[[Any, Any], Any]) -> Callable[[], list[Patch]]:
    """Change every parameter whose name holds ``part``."""
    return weights(lambda found, np_: {name: change(np_, w) for name, w in found.items() if part in name})


def exchanged(a: str, b: str) -> Callable[[], list[Patch]]:
    """Parameters with ``a`` in their name and those with ``b`` there change places."""
    names = lambda found: {name: name.replace(a, b) for name in found if a in name} | {  # noqa: E731
        name: name.replace(b, a) for name in found if b in name
    }
    return weights(lambda found, np_: {name: found[other] for name, other in names(found).items()})


def swapping(where: str, a: str, b: str) -> Callable[[], list[Patch]]:
    """While the module at ``where`` runs, its two submodules have changed places."""

    def change(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        first, second = getattr(self, a), getattr(self, b)
        setattr(self, a, second), setattr(self, b, first)
        try:
            return original(self, *args, **kwargs)
        finally:
            setattr(self, a, first), setattr(self, b, second)

    return wrapped(where, change)


def rms(np_: Any, x: Any, eps: float, axis: Any = -1) -> Any:
    return x * (np_.mean(x * x, axis=axis, keepdims=True) + eps) ** -0.5


def subclassed(original: Any, backend: str, call: Callable[..., Any]) -> Any:
    return type(f"Mutant{original.__name__}", (original,), {"forward" if backend == "torch" else "__call__": call})


def _full_width(original: Any, backend: str) -> Any:
    np_ = xp(backend)
    return subclassed(original, backend, lambda self, x: self.weight[...] * rms(np_, x, self.eps, (-2, -1)))


def _norm_after_rope() -> list[Patch]:
    waiting: list[Callable[[Any], Any]] = []  # q_norm, rotate, k_norm, rotate: each norm waits for the next rotation

    def late(original: Any, backend: str) -> Any:
        def call(self: Any, x: Any) -> Any:
            waiting.append(lambda rotated: self.weight[...] * rms(xp(backend), rotated, self.eps))
            return x

        return subclassed(original, backend, call)

    def rotate(original: Any, backend: str) -> Any:
        return lambda *args: waiting.pop()(original(*args))

    return [Patch("layers.attention:RMSNorm", late), Patch("layers.attention:rotate", rotate)]


def _interleaved(original: Any, np_: Any, x: Any, cos: Any, sin: Any) -> Any:
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos[:, :, None], sin[:, :, None]
    return np_.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


def _bfloat16(x: Any) -> Any:
    return x.bfloat16().float()


def attending(change: Callable[..., tuple[Any, Any, Any, dict[str, Any], Any]]) -> Callable[[], list[Patch]]:
    """``change(array module, head axis, q, k, v)`` gives q, k, v, options of the kernel, and what its output becomes."""

    def make(original: Any, backend: str) -> Any:
        if backend == "torch":

            def sdpa(q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
                q, k, v, options, after = change(xp("torch"), 1, q, k, v)
                return after(original.scaled_dot_product_attention(q, k, v, **kwargs | options))

            return Instead(original, scaled_dot_product_attention=sdpa)

        def attention(q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
            q, k, v, options, after = change(xp("jax"), 2, q, k, v)
            return after(original.nn.dot_product_attention(q, k, v, **kwargs | options))

        return Instead(original, nn=Instead(original.nn, dot_product_attention=attention))

    return lambda: [Patch(f"layers.attention:{name}", make) for name in ("KERNELS",)]
