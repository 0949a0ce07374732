"""Adapters of a live model: attached, replaced and detached without moving a tensor while there is room for them.

A change that finds room writes into stacks that stay where they are, so captured graphs go on. One that needs more room
builds other stacks, puts other wrappers in place and drops the graphs. All is checked before anything changes.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from loaders.adapters.merging import merge_overflows, merge_problems, merged_weights, whole_overflows
from loaders.adapters.opening import open_adapter, open_on_all
from loaders.adapters.roster import NONE, AdapterOfRows, Roster, check_name
from loaders.adapters.updates import Adapter
from loaders.dtypes import to_numpy
from loaders.errors import CheckpointError
from loaders.events import Event
from torch_models import weights as life
from torch_models.adapter_room import Changes, Room, write
from torch_models.layers.lora import active_rows
from torch_models.parallel import to_host
from torch_models.processes import check_alike, together
from torch_models.sleep import check_awake
from torch_models.storage import NAMES, of_host

if TYPE_CHECKING:
    from torch_models.cache import Cache
    from torch_models.model import Model

_CHANGES = itertools.count(1)  # no number twice: what is undone has its own again, and what came between has none's


@torch.inference_mode(False)
@torch.no_grad()
def attach_lora(model: Model, uri: str | os.PathLike[str], name: str) -> Model:
    """Attach an adapter, or put another one in the place of that name.

    Where PEFT wrote the base's embedding or head beside an adapted one, it must be the one that serves now. So after a
    reload to other weights such an adapter is refused; saved without it (``save_embedding_layers=False``) it is not.

    On a mesh all ranks attach it, or none, and each holds the part that goes with its part of the weights.

    Raises:
        CheckpointError: the adapter does not fit, or has numbers that the model's dtype does not hold; lists all.
            Nothing was changed.
        ValueError: an adapter is merged into the weights, or the name is no name, or ranks name or found
            different adapters.
        RuntimeError: the model must not run; or writing failed, and so did bringing back what was there: none is left.
    """

    def check() -> None:
        check_name(name)
        model.roster.check_unmerged("another adapter")

    _check(model, f"attach {name!r}", check)
    adapter = _opened(model, uri)
    if problems := whole_overflows(adapter, model.config, _stored(model)):
        raise CheckpointError(uri, problems)
    _become(model, model.roster.having(adapter, name, model.version + 1))
    content = f"{name} {adapter.digest[:16]}"
    model.publish(Event("attach", model.version + 1, f"{name}: {adapter.source}", content=content))
    return model


@torch.inference_mode(False)
@torch.no_grad()
def detach_lora(model: Model, name: str) -> Model:
    """Take an adapter away; with the last one all layers are the base's own again.

    Raises:
        ValueError: no adapter is called so, one is merged into the weights, or ranks name different ones.
        RuntimeError: the model must not run.
    """

    def check() -> None:
        model.roster.check_unmerged("taking one away")
        model.roster.lacking(name)

    _check(model, f"detach {name!r}", check)
    _become(model, model.roster.lacking(name))
    model.publish(Event("detach", model.version + 1, name, content=name))
    return model


def merge_lora(model: Model, name: str) -> Model:
    """Write an adapter into the base's weights: float32 sums, rounded once to the dtype each is stored in.

    The weights from before are kept on the host for ``unmerge_lora``. Until then that adapter alone runs, and nothing
    else changes weights or adapters; ``export`` and ``digests`` are of the merged weights. On a mesh every rank merges
    each weight whole, one after the other, and keeps its part: the bits are those of one device.

    Raises:
        ValueError: no adapter is called so, one is merged, or its weights cannot hold it: quantised ones, a table
            that embedding and head share, and those that would be infinite in their dtype. Nothing was changed.
        RuntimeError: the model must not run; or writing failed half-way, and so did bringing back what was there:
            ``unmerge_lora`` tries that again. Where only the first failed, its error, and the weights are as before.
    """

    def check() -> None:
        model.roster.check_unmerged("another one")
        if problems := merge_problems(model.roster[name].adapter, model.config):
            raise ValueError(f"adapter {name!r} cannot be merged: {'; '.join(problems)}. Nothing was changed.")

    _check(model, f"merge {name!r}", check)
    adapter = model.roster[name].adapter
    problems = merge_overflows(adapter, _stored(model), lambda param: _read(model, param))
    if problems:
        raise ValueError(f"adapter {name!r} cannot be merged: {'; '.join(problems)}. Nothing was changed.")
    held, made = life.parameters(model), merged_weights(adapter, lambda param: _read(model, param))
    changes = {param: make for param, make in made.items() if param in held}
    originals = {param: life.stored(model, param).cpu().clone() for param in changes}
    values: Iterable[tuple[str, torch.Tensor]] = ((param, of_host(make())) for param, make in changes.items())
    if (parallel := model.parallel) is not None:  # all before any is written, for it takes all ranks
        # parts of the whole's: a product of parts may round otherwise
        values = [(param, parallel.part(param, value)) for param, value in values]
    try:
        life.write(model, values, list(changes))
    except BaseException as error:
        _unmerge(model, name, originals, error)
        raise
    model.room.unmerged, model.roster = originals, replace(model.roster, merged=name)
    model.publish(Event("merge", model.version + 1, name, content=name))
    return model


def _unmerge(model: Model, name: str, originals: dict[str, torch.Tensor], error: BaseException) -> None:
    """After a merge that failed half-way: what it wrote over is brought back, or kept for ``unmerge_lora``."""
    if model.refusal is None:  # before anything was written
        return
    model.room.unmerged, model.roster = originals, replace(model.roster, merged=name)
    if model.mesh is not None and not isinstance(error, Exception):
        return  # of an interrupt the other ranks know nothing
    life.write(model, originals.items(), list(originals))
    model.room.unmerged, model.roster, model.refusal = {}, replace(model.roster, merged=None), None


def unmerge_lora(model: Model) -> Model:
    """Bring the base's weights back as they were, bit for bit: they are written again, not computed.

    What failed half-way may be called again: all that was merged is written.

    Raises:
        ValueError: nothing is merged.
        RuntimeError: the model sleeps, or writing failed half-way.
    """

    def merged() -> str:
        check_awake(model)
        if model.roster.merged is None:
            raise ValueError("no adapter is merged: there is nothing to undo")
        return model.roster.merged

    name = model.agreed("what is unmerged", merged)
    life.write(model, model.room.unmerged.items(), list(model.room.unmerged))
    model.room.unmerged, model.roster = {}, replace(model.roster, merged=None)
    model.publish(Event("unmerge", model.version + 1, name, content=name))
    return model


def slots_of(model: Model, adapter: AdapterOfRows, rows: int) -> torch.Tensor:
    """Slot of each row's adapter, int64 [B], -1 for none; see ``loaders.adapters.roster.Roster.rows``."""
    return torch.from_numpy(model.roster.rows(adapter, rows)).to(model.device, torch.int64)


def running(model: Model, adapter: AdapterOfRows, rows: int) -> AbstractContextManager[None]:
    """Inside, each row runs with its adapter. A batch of rows without any is run by the base alone."""
    slot_B = model.roster.rows(adapter, rows)
    return nullcontext() if (slot_B == NONE).all() else active_rows(slots_of(model, adapter, rows))


def of_cache(model: Model, cache: Cache) -> AbstractContextManager[None]:
    """Likewise for the rows of a cache, by what stands on the device: a graph is captured of it."""
    return active_rows(cache.adapter) if model.roster.attached else nullcontext()


def _become(model: Model, roster: Roster) -> None:
    """Have the adapters of ``roster``, on all ranks, or those from before.

    All that is to be written is made before anything is, with what is there now; only writing has to be undone.
    """

    def prepared() -> tuple[Changes, Changes]:
        changes = model.room.changes(model.roster, roster)
        return changes, [(place, place.cpu().clone()) for place, _ in changes]

    if roster.layout == model.roster.layout:
        changes, before = together(model.mesh, prepared)
        was = model.roster, model.adapter_changes
        model.adapter_changes = next(_CHANGES)  # before the first of them is another: caches of before are stale
        try:
            together(model.mesh, lambda: write(changes))
            model.roster = roster
        except BaseException as error:  # of this rank or another: all undo it
            model.roster = was[0]
            _undo(model, before, error)
            model.adapter_changes = was[1]  # all is as it was, and so are caches
            raise
    else:
        room, before = together(model.mesh, lambda: Room.made(model, roster)), model.room
        was = model.roster, model.adapter_changes
        model.adapter_changes = next(_CHANGES)
        try:
            _furnish(model, room)
            model.roster = roster
        except BaseException:  # an interrupt
            model.roster = was[0]
            room.remove()
            before.install()
            model.room = before
            model.adapter_changes = was[1]
            raise


def _furnish(model: Model, room: Room) -> None:
    """Have other room for adapters, whose wrappers take the places of those that are there."""
    model.room.remove()
    room.install()
    model.room = room
    model.graphs.drop(reason="the room for adapters is another one")


def _undo(model: Model, before: Changes, error: BaseException) -> None:
    """Bring back what was written over in part; where that fails too, on one rank, none of them has any adapter left.

    Raises:
        RuntimeError: none is left. The base serves, and names of adapters are errors.
    """
    mesh = model.mesh if isinstance(error, Exception) else None  # of an interrupt the others know nothing
    try:
        together(mesh, lambda: write(before))
    except Exception as again:  # noqa: BLE001 - whatever it was, it is said
        lost = ", ".join(repr(one.name) for one in model.roster.attached)
        _furnish(model, Room())
        model.roster = Roster()
        model.adapter_changes = next(_CHANGES)
        model.publish(Event("detach", model.version + 1, f"lost: {lost}"))
        raise RuntimeError(f"{error} Nor could adapters be brought back: {again} Attach {lost} again.") from error


def _stored(model: Model) -> dict[str, np.dtype]:
    return {name: to_numpy(NAMES[param.dtype]) for name, param in life.parameters(model).items()}


def _check(model: Model, asked: str, check: Callable[[], None]) -> None:
    """Raises what ``check`` does, on all ranks; ValueError where they ask for different things."""

    def checked() -> None:
        model.check_runnable()
        check()

    model.agreed("what is asked for", checked, lambda _: asked)


def _opened(model: Model, uri: str | os.PathLike[str]) -> Adapter:
    """An adapter that fits; on a mesh the same on every rank."""
    held, mesh = life.parameters(model), model.mesh

    def read_base(name: str) -> np.ndarray | None:
        return _read(model, name) if name in held else None

    if mesh is None:
        return open_adapter(uri, model.config, read_base=read_base)
    asking = {"together": partial(together, mesh), "check_alike": partial(check_alike, mesh)}
    return open_on_all(uri, model.config, read_base, **asking)


def _read(model: Model, name: str) -> np.ndarray:
    """All of a parameter on this host; on a mesh all ranks have to ask for it."""
    return to_host(model.parallel, name, life.stored(model, name))
