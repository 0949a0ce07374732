"""Ways to plant a bug on either backend, and the models that show them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

from parity.mutants import Kind, Mutant, Patch
from parity.mutants.bench import Detector, Subject, forward

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
_MIXED = (*_TWO, ("layer_types", ("linear_attention", "full_attention")))
HYBRID = Subject("qwen3_5", _MIXED)
HYBRID_HALF = Subject("qwen3_5", _MIXED, "BF16")
WIDE = Subject("qwen3_5", (*_MIXED, ("hidden_size", 96)))  # as wide as all its heads
HYBRID_MOE = Subject("qwen3_5-moe", _MIXED)
DRAFTING = Subject("qwen3_5", _MIXED, is_drafting=True)
_LOCAL = (*_TWO, ("layer_types", ("sliding_attention", "full_attention")))
GEMMA = Subject("gemma3", _LOCAL)
GEMMA_HALF = Subject("gemma3", _LOCAL, "BF16")
GEMMA_CAPPED = Subject("gemma3-capped", _LOCAL)


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
        check_takes(change, original, original)

        def mutant(*args: Any, **kwargs: Any) -> Any:
            return change(original, *args, **kwargs)

        return mutant

    return lambda: [Patch(where, make)]


def check_takes(change: Callable[..., Any], original: Any, *before: Any) -> None:
    """See that ``change(*before, ...)`` can be called as ``original`` is, what has a default by its name or not at all.

    Raises:
        TypeError: it cannot, so that the bug would be another one than it says.
    """
    if not inspect.isroutine(inspect.unwrap(original)):
        return
    params = inspect.signature(original).parameters.values()
    needed = [p.name for p in params if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p.name for p in params if p.default is not p.empty or p.kind is p.KEYWORD_ONLY]
    inspect.signature(change).bind(*before, *needed, **dict.fromkeys(named))


def at_backend(where: str, change: Callable[..., Any]) -> Callable[[], list[Patch]]:
    """As ``wrapped``, with the backend's array module for a second argument."""

    def make(original: Any, backend: str) -> Any:
        check_takes(change, original, original, xp(backend))
        return lambda *args, **kwargs: change(original, xp(backend), *args, **kwargs)

    return lambda: [Patch(where, make)]


def weights(edit: Callable[[dict[str, Any], Any], dict[str, Any]]) -> Callable[[], list[Patch]]:
    """Every load gives other weights: ``edit(parameters by name, array module)`` returns those that change."""

    def make(original: Any, backend: str) -> Any:
        def read(*args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
            kwargs.pop("staging", None)  # all are held at once here
            found = dict(original(*args, **kwargs))
            changed = edit(found, xp(backend))
            if backend == "torch":
                changed = {name: w.clone().contiguous() for name, w in changed.items()}
            yield from (found | changed).items()

        return read

    return lambda: [Patch("reading:read_params", make)]


def each(part: str, change: Callable[[Any, Any], Any]) -> Callable[[], list[Patch]]:
    """Change every parameter whose name holds ``part``."""
    return weights(lambda found, np_: {name: change(np_, w) for name, w in found.items() if part in name})


def exchanged(a: str, b: str) -> Callable[[], list[Patch]]:
    """Parameters with ``a`` in their name and those with ``b`` there change places."""

    def edit(found: dict[str, Any], np_: Any) -> dict[str, Any]:
        there = {name: found[name.replace(a, b)] for name in found if a in name}
        return there | {name: found[name.replace(b, a)] for name in found if b in name}

    return weights(edit)


def swapping(where: str, a: str, b: str) -> Callable[[], list[Patch]]:
    """While the module at ``where`` runs, its two submodules have changed places."""

    def change(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        first, second = getattr(self, a), getattr(self, b)
        setattr(self, a, second)
        setattr(self, b, first)
        try:
            return original(self, *args, **kwargs)
        finally:
            setattr(self, a, first)
            setattr(self, b, second)

    return wrapped(where, change)


def uncached(original: Any, backend: str) -> Any:
    """The function without what it remembers of earlier calls, where it remembers any."""
    function = inspect.unwrap(original)
    return lambda *args: function(*args)


def rms(np_: Any, x: Any, eps: float, axis: Any = -1) -> Any:
    return x * (np_.mean(x * x, axis=axis, keepdims=True) + eps) ** -0.5


def bfloat16(x: Any) -> Any:
    """float32 rounded to bfloat16's bits. In JAX not by casts: XLA leaves out a cast there and back."""
    return x.bfloat16().float() if hasattr(x, "bfloat16") else import_module("jax.lax").reduce_precision(x, 8, 7)


def framework(where: str, torch_name: str, change: Callable[[Any, Any], dict[str, Any]]) -> Callable[[], list[Patch]]:
    """Other functions of the framework for one module: ``change(array module, functions)`` gives them by name.

    ``functions``: what the module calls ``torch_name`` (``F`` or ``torch``), and ``jax.nn``.
    """

    def make(original: Any, backend: str) -> Any:
        if backend == "torch":
            return Instead(original, **change(xp("torch"), original))
        return Instead(original, nn=Instead(original.nn, **change(xp("jax"), original.nn)))

    return lambda: [Patch(f"{where}:jax", make, in_torch=f"{where}:{torch_name}")]


def subclassed(original: Any, backend: str, call: Callable[..., Any]) -> Any:
    return type(f"Mutant{original.__name__}", (original,), {"forward" if backend == "torch" else "__call__": call})


def attending(change: Callable[..., tuple[Any, Any, Any, dict[str, Any], Any]]) -> Callable[[], list[Patch]]:
    """``change(array module, head axis, q, k, v)`` gives q, k, v, kernel options, and what its output becomes."""

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

    return lambda: [Patch("layers.attention:KERNELS", make)]


def of(
    kind: Kind,
    name: str,
    source: str,
    plant: Callable[[], Sequence[Patch]],
    says: str,
    subject: Subject = DENSE,
    *,
    detector: Detector = forward,
    **more: Any,
) -> Mutant:
    return Mutant(name, kind, says, source, plant, subject, detector, **more)
