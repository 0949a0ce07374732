"""Adapters of a model: attached, replaced, detached, merged. Pure: a model goes in, a new one comes out, or an error.

All is checked before a new model is made; the old one serves on. Within a layout nothing is compiled, see
``jax_models.adapter_room``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from jax_models.adapter_room import Room, room_for
from jax_models.processes import check_alike, placed, processes_of, to_host, together
from jax_models.weights import flatten, unflatten
from loaders.adapters.merging import merge_overflows, merge_problems, merged_weights, whole_overflows
from loaders.adapters.opening import open_adapter, open_on_all
from loaders.adapters.roster import Roster, check_name
from loaders.adapters.updates import Adapter
from loaders.errors import CheckpointError

if TYPE_CHECKING:
    from jax_models.model import Model


def attach_lora(model: Model, uri: str | os.PathLike[str], name: str) -> Model:
    """A model with one more adapter, or with another one in the place of that name.

    Where PEFT wrote the base's embedding or head beside an adapted one, it must be the one that serves now. So after a
    reload to other weights such an adapter is refused; saved without it (``save_embedding_layers=False``) it is not.

    Raises:
        CheckpointError: the adapter does not fit, or has numbers that the model's dtype does not hold; lists all.
        ValueError: an adapter is merged into the weights, or the name is no name.
    """

    def check() -> None:
        check_name(name)
        model.roster.check_unmerged("another adapter")

    _check(model, f"attach {name!r}", check)
    adapter = _opened(model, uri)
    if problems := whole_overflows(adapter, model.config, _stored(model)):
        raise CheckpointError(uri, problems)
    roster = model.roster.having(adapter, name, model.version + 1)
    return _with(model, roster, "attach", f"{name}: {adapter.source}", f"{name} {adapter.digest[:16]}")


def detach_lora(model: Model, name: str) -> Model:
    """A model without an adapter; with the last one gone, its programs are the base's own again.

    Raises:
        ValueError: no adapter is called so, or one is merged into the weights.
    """

    def check() -> None:
        model.roster.check_unmerged("taking one away")
        model.roster.lacking(name)

    _check(model, f"detach {name!r}", check)
    return _with(model, model.roster.lacking(name), "detach", name, name)


def merge_lora(model: Model, name: str) -> Model:
    """A model with an adapter in its weights: float32 sums, rounded once to the dtype each is stored in.

    The arrays from before are kept for ``unmerge_lora``. Until then that adapter alone runs, and nothing else changes
    weights or adapters; ``export`` and ``digests`` are of the merged weights.

    Raises:
        ValueError: no adapter is called so, one is merged, or its weights cannot hold it: quantised ones, a table
            that embedding and head share, and those that would be infinite in their dtype.
    """

    def check() -> None:
        model.roster.check_unmerged("another one")
        if problems := merge_problems(model.roster[name].adapter, model.config):
            raise ValueError(f"adapter {name!r} cannot be merged: {'; '.join(problems)}. Nothing was changed.")

    _check(model, f"merge {name!r}", check)
    adapter = model.roster[name].adapter
    flat = flatten(model.weights)
    if problems := merge_overflows(adapter, _stored(model), lambda param: to_host(flat[param])):
        raise ValueError(f"adapter {name!r} cannot be merged: {'; '.join(problems)}. Nothing was changed.")
    made = merged_weights(adapter, lambda param: to_host(flat[param]))
    changes = {param: make for param, make in made.items() if param in flat}
    originals = {param: flat[param] for param in changes}
    flat |= {param: placed(make(), originals[param].sharding) for param, make in changes.items()}
    merged = model.published(unflatten(flat), "merge", name, content=name)
    return dataclasses.replace(merged, roster=dataclasses.replace(model.roster, merged=name), unmerged=originals)


def unmerge_lora(model: Model) -> Model:
    """A model with the very arrays from before the merge.

    Raises:
        ValueError: nothing is merged.
    """

    def merged() -> str:
        model.check_runnable()
        if model.roster.merged is None:
            raise ValueError("no adapter is merged: there is nothing to undo")
        return model.roster.merged

    name = model.agreed("what is unmerged", merged)
    weights = unflatten(flatten(model.weights) | model.unmerged)
    restored = model.published(weights, "unmerge", name, content=name)
    return dataclasses.replace(restored, roster=dataclasses.replace(model.roster, merged=None), unmerged={})


def _stored(model: Model) -> dict[str, np.dtype]:
    return {name: array.dtype for name, array in flatten(model.weights).items()}


def _opened(model: Model, uri: str | os.PathLike[str]) -> Adapter:
    """An adapter that fits; the same on every process."""
    flat, mesh = flatten(model.weights), model.mesh

    def read_base(name: str) -> np.ndarray | None:
        return to_host(flat[name]) if name in flat else None

    if len(processes_of(mesh)) == 1:
        return open_adapter(uri, model.config, read_base=read_base)
    asking = {"together": partial(together, mesh), "check_alike": partial(check_alike, mesh)}
    return open_on_all(uri, model.config, read_base, **asking)


def _check(model: Model, asked: str, check: Callable[[], None]) -> None:
    """See that all processes ask for the same, and that it can be done."""

    def checked() -> str:
        model.check_runnable()
        check()
        return asked

    model.agreed("what is asked for", checked)


def _with(model: Model, roster: Roster, kind: str, detail: str, content: str) -> Model:
    flat = flatten(model.weights)
    room = Room()
    if roster.attached:
        dtypes = {name: x.dtype for name, x in flat.items()}
        like = next(iter(flat.values()))
        room = room_for(roster, model.config, dtypes, np.dtype(model.dtype), model.mesh, like)
    return dataclasses.replace(model.published(model.weights, kind, detail, content=content), roster=roster, room=room)
