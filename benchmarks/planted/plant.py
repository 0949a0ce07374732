"""Planting: text of a method or function exchanged, in one decoder layer or in all, or a loaded weight changed."""

import contextlib
import dataclasses
import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.planted import pieces

PACKAGES = ("torch_models", "jax_models", "loaders")
BF16 = {"dtype": "bfloat16", "stored": "BF16"}


@dataclass(frozen=True)
class Text:
    """``old`` in a function becomes ``new``, wherever it was imported.

    ``where``: ``module.Class`` of the backend, whose ``forward`` or ``__call__`` is meant, ``module.Class.method``, or
    ``module.function``; of a function in ``loaders.`` both backends' one.
    """

    where: str
    old: str
    new: str
    count: int = 1


@dataclass(frozen=True)
class Weight:
    """A parameter becomes ``change(its values, values by name)``; ``{layer}`` in its name is the bug's."""

    name: str
    change: Callable[[np.ndarray, Callable[[str], np.ndarray]], np.ndarray]


@dataclass(frozen=True, eq=False)
class Bug:
    """One planted bug.

    Attributes:
        name: unique.
        side: ``torch``, ``jax``, or ``both`` for what they share of ``loaders``.
        model: of the zoo.
        edits: what is changed.
        layer: the decoder layer it is in; None: in all, or around them.
        where: what is to be named where that is no layer given above: ``layer 1``, ``embed``, ``norm``, ``head``.
        dtype: computed in; None: as stored.
        stored: dtype of the checkpoint.
        options: of ``tandem run``.
        quantized: the checkpoint is NVFP4.
        event: None: ``tandem run`` is to see it; else ``lifecycle``.
        equivalent: why nobody could see it.
    """

    name: str
    side: str
    model: str
    edits: tuple[Any, ...]
    layer: int | None = None
    where: str | None = None
    dtype: str | None = None
    stored: str = "F32"
    options: dict[str, Any] = field(default_factory=dict)
    quantized: bool = False
    event: str | None = None
    equivalent: str | None = None

    @property
    def expected(self) -> str | None:
        """What is to be named; None: the bug has no one place."""
        return self.where or (None if self.layer is None else f"layer {self.layer}")


Row = tuple[Any, ...]


def bugs(side: str, where: str, *rows: Row, **more: Any) -> tuple[Bug, ...]:
    """Bugs of one function: rows of (name, model, place, old, new), and where it needs them a dict of what else is set.

    ``place`` is the decoder layer, the name of another place, or None where the bug is in no one place; ``more`` holds
    for all rows.
    """

    found = []
    for name, model, place, old, new, *rest in rows:
        own = dict(*rest)
        edit = Text(where, old, new, own.pop("count", 1))
        found.append(Bug(f"{side} {name}", side, model, (edit,), **_placed(place), **(more | own)))
    return tuple(found)


def weight_bugs(side: str, *rows: Row, **more: Any) -> tuple[Bug, ...]:
    """Bugs of loaded weights: rows of (name, model, place, parameter, change); see ``Weight``."""
    return tuple(
        Bug(f"{side} {name}", side, model, (Weight(parameter, change),), **_placed(place), **more)
        for name, model, place, parameter, change in rows
    )


def _placed(place: int | str | None) -> dict[str, Any]:
    return {"layer": place} if isinstance(place, int) else {"where": place}


@contextlib.contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """The bug's text is in the code inside the block; programs and constants made of other text are dropped."""
    with contextlib.ExitStack() as undo:
        _forget()
        undo.callback(_forget)
        for edit in bug.edits:
            if isinstance(edit, Text):
                _plant_text(undo, bug, edit)
        yield


def with_weights(model: Any, bug: Bug) -> Any:
    """The loaded model with the weights the bug changes."""
    edits = [edit for edit in bug.edits if isinstance(edit, Weight)]
    if bug.side == "both":  # what they share is text
        return model
    return (_torch_weights if bug.side == "torch" else _jax_weights)(model, bug, edits)


def _plant_text(undo: contextlib.ExitStack, bug: Bug, edit: Text) -> None:
    words = edit.where.split(".")
    classes = [index for index, word in enumerate(words) if word[0].isupper()]
    end = classes[0] if classes else len(words) - 1
    kind, name = (words[end], ".".join(words[end + 1 :])) if classes else (None, words[end])
    where = ".".join(words[:end])
    module = importlib.import_module(where if where.startswith("loaders") else f"{bug.side}_models.{where}")
    if kind is None:
        _plant_function(undo, getattr(module, name), edit)
    else:
        _plant_method(
            undo, getattr(module, kind), name or ("forward" if bug.side == "torch" else "__call__"), bug, edit
        )


def _plant_method(undo: contextlib.ExitStack, owner: type, name: str, bug: Bug, edit: Text) -> None:
    clean = vars(owner)[name]
    changed = _changed(clean, edit)

    def either(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = f"{getattr(self, 'path', '') or vars(self).get('planted_path', '')}."
        is_here = f"layers.{bug.layer}." in path and not path.startswith("mtp.")
        return (changed if is_here else clean)(self, *args, **kwargs)

    _put(undo, owner, name, changed if bug.layer is None else either)


def _plant_function(undo: contextlib.ExitStack, clean: Callable[..., Any], edit: Text) -> None:
    changed = _changed(clean, edit)
    for one in list(sys.modules.values()):
        if getattr(one, "__name__", "").partition(".")[0] in PACKAGES:
            for name in [name for name, value in vars(one).items() if value is clean]:
                _put(undo, one, name, changed)


def _changed(clean: Any, edit: Text) -> Any:
    """The function of the changed text.

    Raises:
        ValueError: the source no longer says what is to be changed.
    """
    function = inspect.unwrap(clean)
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(edit.old) != edit.count:
        raise ValueError(f"{function.__qualname__} has {edit.old!r} {source.count(edit.old)} times, not {edit.count}")
    scope = vars(pieces) | function.__globals__
    found: dict[str, Any] = {}
    text = f"from __future__ import annotations\n{source.replace(edit.old, edit.new)}"
    exec(compile(text, f"<planted {function.__qualname__}>", "exec"), scope, found)
    return found[function.__name__]


def _put(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, vars(owner)[name])
    setattr(owner, name, value)


def _forget() -> None:
    importlib.import_module("jax_models.programs").shared_programs.cache_clear()
    rotary = importlib.import_module("torch_models.layers.rotary")
    for name in ("_axes", "_static_frequencies", "_exponents_on"):
        if hasattr(clean := getattr(rotary, name), "cache_clear"):
            clean.cache_clear()


def _torch_weights(model: Any, bug: Bug, edits: list[Weight]) -> Any:
    torch = pieces.torch
    for path, module in model.named_modules():
        vars(module).setdefault("planted_path", path)  # modules without taps do not know where they are

    def values(name: str) -> np.ndarray:
        return model.get_parameter(name).detach().float().numpy().copy()

    for edit in edits:
        name = edit.name.format(layer=bug.layer)
        changed = torch.from_numpy(np.ascontiguousarray(edit.change(values(name), values)))
        with torch.no_grad():
            model.get_parameter(name).copy_(changed)
    return model


def _jax_weights(model: Any, bug: Bug, edits: list[Weight]) -> Any:
    from flax import traverse_util

    flat = dict(traverse_util.flatten_dict(model.weights, sep="."))

    def values(name: str) -> np.ndarray:
        return np.array(flat[name])

    for edit in edits:
        name = edit.name.format(layer=bug.layer)
        changed = np.asarray(edit.change(values(name), values)).astype(flat[name].dtype)
        flat[name] = pieces.jax.device_put(np.array(changed), flat[name].sharding)
    return dataclasses.replace(model, weights=traverse_util.unflatten_dict(flat, sep=".")) if edits else model
