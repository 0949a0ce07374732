"""The life of the weights: swap, reload, export. Pure: a model goes in, a new one comes out, or an error."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.core import Tracer

from jax_models.processes import check_alike, processes_of, to_host, together, told_by_all
from loaders.digest import digests, tensor_digest
from loaders.dtypes import from_numpy
from loaders.events import Event
from loaders.export import TensorReader, export_checkpoint, exported_params
from loaders.filling import Filling
from loaders.plan import LoadPlan, LoadReport, plan_reload, specs_of
from loaders.quantize import open_to_load
from loaders.writer import new_directory

if TYPE_CHECKING:
    from jax_models.model import Model
    from jax_models.programs import Weights

log = logging.getLogger(__name__)


def flatten(weights: Weights) -> dict[str, jax.Array]:
    """Parameters by checkpoint name."""
    return cast("dict[str, jax.Array]", traverse_util.flatten_dict(weights, sep="."))


def get_embed_and_head(model: Model) -> tuple[jax.Array | None, jax.Array | None]:
    """Embedding and head, [V, D] as stored, codes of a quantised head; None for a half this stage lacks; tied: one."""
    specs = specs_of(model.config, model.stage)
    flat = flatten(model.weights)
    return flat[specs.embedding] if specs.embedding else None, flat[specs.head] if specs.head else None


def set_embed_and_head(model: Model, embed: Any = None, head: Any = None) -> Model:
    """Swap embedding and head. Every other buffer is shared with the old model, which stays as it was.

    A half given as None is left alone; one this stage lacks is ignored and reported in the event. Setting the
    very array that is there publishes nothing. A JAX array is shared, not copied: do not donate it afterwards.

    Args:
        model: the model to start from.
        embed: [V, D] in the stored dtype, JAX or NumPy (copied).
        head: likewise; in a tied model only the embedding itself or an equal array.
    Raises:
        ValueError: listing wrong shapes and dtypes, a head that a tied model cannot have, or one that is quantised;
            or an adapter is merged into the weights; or processes hand over different values.
    """
    asked, ignored = together(model.mesh, lambda: _checked_halves(model, embed, head))
    flat = flatten(model.weights)
    check_alike(model.mesh, "what is handed over", lambda: _said(asked, flat))
    if model.config.tie_word_embeddings and "head" in asked:
        _check_tied(head, asked["embed"][1] if "embed" in asked else flat[asked["head"][0]])
        asked = {"embed": asked["embed"]} if "embed" in asked else {}
    changed = {name: value for name, value in asked.values() if value is not flat[name]}
    for half in ignored:
        log.info("set_embed_and_head: %s ignored, stage %d of %d has none", half, model.stage.index, model.stage.count)
    if not changed:
        event = Event("swap", model.version, "nothing changed", ignored)
        return dataclasses.replace(model, events=(*model.events, event)) if ignored else model
    for name, value in changed.items():
        # a NumPy buffer is copied first: device_put on CPU would alias it, and its owner may write to it again
        # a weakly typed array is another type to jit: naming the dtype makes it a strong one
        source = jnp.asarray(value, value.dtype) if isinstance(value, jax.Array) else np.array(value)
        flat[name] = jax.device_put(source, flat[name].sharding)
    return model.published(traverse_util.unflatten_dict(flat, sep="."), "swap", " and ".join(asked), ignored)


Halves = dict[str, tuple[str, Any]]  # half -> name of its parameter, and what it is to be


def _checked_halves(model: Model, embed: Any, head: Any) -> tuple[Halves, tuple[str, ...]]:
    """Those that are asked for and fit, and those that this stage lacks."""
    model.roster.check_unmerged("a swap")
    specs = specs_of(model.config, model.stage)
    flat = flatten(model.weights)
    given = {"embed": (specs.embedding, embed), "head": (specs.head, head)}
    ignored = tuple(half for half, (name, value) in given.items() if value is not None and name is None)
    asked = {half: (name, value) for half, (name, value) in given.items() if value is not None and name is not None}
    quantized = [half for half, (name, _) in asked.items() if name.rpartition(".")[0] in specs.schemes]
    problems = [
        f"{half} is quantised: its codes mean nothing without their scales. Reload a checkpoint instead"
        for half in quantized
        if asked[half][1] is not flat[asked[half][0]]
    ]
    problems += [
        problem
        for half, (name, value) in asked.items()
        if half not in quantized
        for problem in _misfits(half, value, flat[name])
    ]
    if problems:
        raise ValueError("; ".join(problems) + ". Nothing was changed.")
    return asked, ignored


def _said(asked: Halves, flat: Mapping[str, jax.Array]) -> str:
    """Of each half: that it is the live one, or an array of all processes, or what this one has in it."""
    return ", ".join(
        f"{half} {'as it is' if value is flat[name] else _content(value)}" for half, (name, value) in asked.items()
    )


def _content(value: Any) -> str:
    is_shared = isinstance(value, jax.Array) and not value.is_fully_addressable
    return "of all" if is_shared else tensor_digest(np.asarray(value))[:16]


def _misfits(half: str, value: Any, live: jax.Array) -> list[str]:
    if not isinstance(value, jax.Array | np.ndarray):
        return [f"{half} is a {type(value).__name__}, expected a JAX or NumPy array"]
    if (value.shape, value.dtype) == (live.shape, live.dtype):
        return []
    return [f"{half} is {value.dtype} {value.shape}, expected {live.dtype} {live.shape} (vocab_size, hidden_size)"]


def _check_tied(head: Any, embed: Any) -> None:
    if head is embed or np.array_equal(_bits(head), _bits(embed)):  # in this order on all processes
        return
    raise ValueError("tie_word_embeddings is true: head must be the embedding or equal to it. Nothing was changed.")


def _bits(value: Any) -> np.ndarray:
    return np.ascontiguousarray(to_host(value) if isinstance(value, jax.Array) else value).view(np.uint8)


def update_weights_from_disk(
    model: Model, uri: str | os.PathLike[str], *, donate: bool = False, host_budget_bytes: int | None = None
) -> Model:
    """A new version with the weights of another checkpoint of the same config, without compiling anything.

    The checkpoint is checked whole before a byte is read, then read whole into new buffers, then published. Until then,
    and after any failure, the old model serves unchanged; after it, too, at the price of its memory. With ``donate`` it
    gives its memory up: everything is read once to see that it can be, then again, and each old parameter is deleted
    as its successor is complete, so that memory holds one of them twice at most. A model that was loaded with
    ``quantize`` quantises again.

    Args:
        model: the model to start from.
        uri: the new checkpoint.
        donate: give up the weights of ``model``, and of every model that shares them.
        host_budget_bytes: as for ``load``; with ``donate`` one parameter is held on the host in any case.
    Raises:
        CheckpointError: listing everything that does not fit, or what could not be read. The old weights serve on.
        ValueError: an adapter is merged into the weights, or the budget is too small. Nothing was read.
        RuntimeError: with ``donate``, reading or placing failed the second time; ``model`` cannot run, but can be
            updated again. Of several processes all say so, also one that had given up nothing itself.
    """
    model.roster.check_unmerged("a reload")
    from jax_models.load import read_in_vain, read_params, stays_on_host  # the loader builds models

    live = flatten(model.weights)
    dtypes = {name: from_numpy(x.dtype) for name, x in live.items()}
    given_up: list[str] = []

    def planned() -> LoadPlan:
        plan = plan_reload(open_to_load(uri, model.quantize), model.config, model.stage, dtypes)
        plan = plan.within(host_budget_bytes, staged=donate or not stays_on_host(model.mesh))
        if donate:
            read_in_vain(plan, model.mesh)
        return plan

    def read() -> tuple[dict[str, jax.Array], LoadReport]:
        filling, placed = Filling(plan), {}
        for name, array in read_params(plan, filling, model.mesh):
            placed[name] = array
            if donate:
                live[name].delete()
                given_up.append(name)
        return placed, filling.finish(is_again=donate)

    plan = together(model.mesh, planned)
    check_alike(model.mesh, "the checkpoint", plan.checkpoint.fingerprint)
    try:
        placed, report = together(model.mesh, read)
    except Exception as error:
        counts = told_by_all(model.mesh, str(len(given_up))) if donate else {}
        if not any(map(int, counts.values())):
            raise
        if len(counts) > 1:  # of a model that lacks a part elsewhere nothing may run here either
            for array in live.values():
                array.delete()
        where = "" if len(counts) == 1 else f" on one of {len(counts)} processes"
        given = f"{max(map(int, counts.values()))} of {len(live)} parameters were given up already{where}"
        raise RuntimeError(f"{given}. Update again with good weights: {error}") from error
    weights = traverse_util.unflatten_dict(placed, sep=".")
    check_same_structure(model.weights, weights)
    checkpoint = plan.checkpoint
    updated = model.published(weights, "reload", str(checkpoint.source))
    return dataclasses.replace(updated, checkpoint=checkpoint, config=checkpoint.config, report=report)


def committed_like(live: Weights, new: Weights) -> Weights:
    """The same arrays, committed to their devices as the live ones are: jit compiles again when that differs."""

    def committed(leaf: jax.Array, old: jax.Array) -> jax.Array:
        is_traced = isinstance(leaf, Tracer) or isinstance(old, Tracer)
        return leaf if is_traced else jax.device_put(leaf, old.sharding)

    return jax.tree.map(committed, new, live)


def check_same_structure(live: Weights, new: Weights) -> None:
    """Same names, shapes, dtypes and shardings: what keeps every compiled program valid.

    Raises:
        ValueError: listing every leaf that differs.
    """
    old_flat, new_flat = flatten(live), flatten(new)
    problems = [f"{name} is missing" for name in old_flat if name not in new_flat]
    problems += [f"{name} is unexpected" for name in new_flat if name not in old_flat]
    for name, old in old_flat.items():
        found = new_flat.get(name)
        if found is None:
            continue
        if not isinstance(found, jax.Array):
            problems.append(f"{name} is a {type(found).__name__}, expected a JAX array")
        elif (found.shape, found.dtype) != (old.shape, old.dtype):
            problems.append(f"{name} is {found.dtype} {found.shape}, expected {old.dtype} {old.shape}")
        elif found.weak_type != old.weak_type:
            problems.append(f"{name} is weakly typed. Give it its dtype: jnp.asarray(x, x.dtype)")
        elif not isinstance(found, Tracer) and not found.sharding.is_equivalent_to(old.sharding, old.ndim):
            problems.append(f"{name} is sharded as {found.sharding}, expected {old.sharding}")
    if problems:
        raise ValueError("; ".join(problems) + ". Nothing was changed.")


def export(model: Model, directory: str | os.PathLike[str]) -> Path:
    """Write the checkpoint's tensors as they stand now, bit for bit; see ``loaders.export.export_checkpoint``.

    Of a mesh of several processes all call this: the first one writes, and the others hand it their parts.
    """
    flat = flatten(model.weights)
    specs = specs_of(model.config, model.stage, model.checkpoint.tensors)
    left_out = model.report.left_out if model.stage.count == 1 else ()
    processes = processes_of(model.mesh)
    if len(processes) == 1:
        return export_checkpoint(directory, model.checkpoint, specs, lambda name: np.asarray(flat[name]), left_out)
    is_writer = jax.process_index() == processes[0]
    together(model.mesh, lambda: new_directory(directory) if is_writer else None)
    waiting = deque(exported_params(model.checkpoint, tensor_reader(model), left_out))

    def read_param(name: str) -> np.ndarray:
        assert waiting.popleft() == name, f"{name} is asked for out of turn"
        return to_host(flat[name])

    def write() -> None:
        try:
            if is_writer:
                export_checkpoint(directory, model.checkpoint, specs, read_param, left_out)
        finally:  # whatever became of the writing, nobody may wait for ever
            while waiting:
                read_param(waiting[0])

    together(model.mesh, write)
    return Path(directory)


def tensor_reader(model: Model) -> TensorReader:
    """Any checkpoint tensor the model holds, by name, on the host in its stored dtype."""
    flat = flatten(model.weights)
    specs = specs_of(model.config, model.stage, model.checkpoint.tensors)
    return TensorReader(model.checkpoint, specs, lambda name: to_host(flat[name]))


def weight_digests(model: Model) -> dict[str, str]:
    """Digest of every checkpoint tensor the model holds, by name."""
    return digests(tensor_reader(model))
