"""The life of the weights: reload and export. Pure: a model goes in, a new one comes out, or an error."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np
from flax import traverse_util
from jax.core import Tracer
from jax.sharding import Mesh

from jax_models import reading
from jax_models.processes import check_alike, processes_of, to_host, together, told_by_all
from loaders.digest import digests
from loaders.dtypes import from_numpy
from loaders.quantization.quantize import open_to_load
from loaders.reading.filling import Filling
from loaders.reading.plan import LoadPlan, LoadReport, plan_reload
from loaders.writing.export import TensorReader, export_checkpoint, export_together

if TYPE_CHECKING:
    from jax_models.model import Model
    from jax_models.programs import Weights

MOST_SHOWN = 20  # of what is wrong with new weights: a model has thousands


def flatten(weights: Weights) -> dict[str, jax.Array]:
    """Parameters by checkpoint name."""
    return cast("dict[str, jax.Array]", traverse_util.flatten_dict(weights, sep="."))


def unflatten(parameters: Mapping[str, Any]) -> Weights:
    """The pytree of parameters by checkpoint name, or of whatever stands for them."""
    return traverse_util.unflatten_dict(dict(parameters), sep=".")


def update_weights_from_disk(
    model: Model, uri: str | os.PathLike[str], *, donate: bool = False, host_budget_bytes: int | None = None
) -> Model:
    """A new version with the weights of another checkpoint of the same config, without compiling anything.

    The checkpoint is checked whole before a byte is read, then read whole into new buffers, then published. If anything
    fails the old model goes on serving, unchanged; after a success it stays usable too, at the cost of its memory. With
    ``donate`` its memory is used again: the checkpoint is read once to see that all of it can be, then a second time,
    and each old parameter is deleted as its successor is complete, so that memory holds at most one of them twice. A
    model that was loaded with ``quantize`` quantises again.

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
    model.agreed("what is updated", lambda: model.roster.check_unmerged("a reload"), lambda _: "the model")
    live = flatten(model.weights)
    dtypes = {name: from_numpy(x.dtype) for name, x in live.items()}
    given_up: list[str] = []

    def planned() -> LoadPlan:
        plan = plan_reload(open_to_load(uri, model.quantize), model.config, model.stage, dtypes)
        staged, held = donate or not reading.stays_on_host(model.mesh), reading.held_on(model.mesh, model.config)
        plan = plan.within(host_budget_bytes, staged=staged, boxes_of=held)
        if donate:
            reading.dry_run(plan, model.mesh)
        return plan

    def read() -> tuple[dict[str, jax.Array], LoadReport]:
        filling, placed = Filling(plan), {}
        for name, array in reading.read_params(filling, model.mesh):
            placed[name] = array
            if donate:
                live[name].delete()
                given_up.append(name)
        report = filling.finish(is_again=donate)
        check_same_structure(model.weights, unflatten(placed))
        return placed, report

    with _where(live, model.mesh):
        plan = together(model.mesh, planned)
    content = check_alike(model.mesh, "the checkpoint", lambda: f"{plan.checkpoint.fingerprint()}, donate={donate}")
    try:
        with _where(live, model.mesh):
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
    checkpoint = plan.checkpoint
    updated = model.published(unflatten(placed), "reload", str(checkpoint.source), content=content)
    return dataclasses.replace(
        updated, checkpoint=checkpoint, config=checkpoint.config, specs=plan.specs, report=report
    )


def _where(live: Mapping[str, jax.Array], mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Inside, what is placed without a mesh goes where the live weights are, whatever the default device is by now."""
    (device, *_) = next(iter(live.values())).sharding.device_set
    return nullcontext() if mesh is not None else jax.default_device(device)


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
    try:
        old_flat, new_flat = flatten(live), flatten(new)
    except (AssertionError, AttributeError, TypeError) as error:  # flax's
        raise ValueError("weights are no nested dicts by strings, as model.weights. Nothing was changed.") from error
    problems = [f"{name} is missing" for name in old_flat if name not in new_flat]
    problems += [f"{name} is unexpected" for name in new_flat if name not in old_flat]
    for name, old in old_flat.items():
        found = new_flat.get(name)
        if found is None:
            continue
        if not isinstance(found, jax.Array):
            problems.append(f"{name} is a {type(found).__name__}, expected a JAX array")
        elif not isinstance(found, Tracer) and found.is_deleted():
            problems.append(f"{name} was given up: its memory was donated")
        elif (found.shape, found.dtype) != (old.shape, old.dtype):
            problems.append(f"{name} is {found.dtype} {found.shape}, expected {old.dtype} {old.shape}")
        elif found.weak_type != old.weak_type:
            problems.append(f"{name} is weakly typed. Give it its dtype: jnp.asarray(x, x.dtype)")
        elif not isinstance(found, Tracer) and not found.sharding.is_equivalent_to(old.sharding, old.ndim):
            problems.append(f"{name} is sharded as {found.sharding}, expected {old.sharding}")
    if problems:
        shown = problems[:MOST_SHOWN] + [f"and {len(problems) - MOST_SHOWN} more"] * (len(problems) > MOST_SHOWN)
        raise ValueError("; ".join(shown) + ". Nothing was changed.")


def export(model: Model, directory: str | os.PathLike[str]) -> Path:
    """Write the checkpoint's tensors as they stand now, bit for bit; see ``loaders.writing.export.export_checkpoint``.

    Of a mesh of several processes all call this: the first one writes, and the others hand it their parts.
    """
    model.agreed("what is exported", model.check_runnable, lambda _: "the model")
    flat = flatten(model.weights)
    left_out = model.report.left_out if model.stage.count == 1 else ()
    processes = processes_of(model.mesh)
    if len(processes) == 1:
        return export_checkpoint(
            directory, model.checkpoint, model.specs, lambda name: np.asarray(flat[name]), left_out
        )
    return export_together(
        directory,
        model.checkpoint,
        model.specs,
        lambda name: to_host(flat[name]),
        left_out,
        is_writer=jax.process_index() == processes[0],
        together=partial(together, model.mesh),
    )


def tensor_reader(model: Model) -> TensorReader:
    """Any checkpoint tensor the model holds, by name, on the host in its stored dtype.

    All processes of a mesh have to ask for one, and then for the same, in the same order.
    """
    model.agreed("what is read", model.check_runnable, lambda _: "the model")
    flat = flatten(model.weights)
    return TensorReader(model.checkpoint, model.specs, lambda name: to_host(flat[name]))


def weight_digests(model: Model) -> dict[str, str]:
    """Digest of every checkpoint tensor the model holds, by name."""
    return digests(tensor_reader(model))
