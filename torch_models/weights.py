"""The life of the weights: reload and export. In place: nothing moves, and nothing changes unless everything can."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from loaders import CheckpointError
from loaders.digest import digests
from loaders.events import Event
from loaders.quantization.quantize import open_to_load
from loaders.reading.filling import Filling
from loaders.reading.plan import LoadPlan, LoadReport, plan_reload
from loaders.writing.export import TensorReader, export_checkpoint, export_together
from torch_models import reading
from torch_models.census import moved, pointer_census
from torch_models.derived import derive, mark_source
from torch_models.layers.quantized import as_loaded
from torch_models.one_version import unchanged
from torch_models.parallel import to_host
from torch_models.processes import check_alike, together, told_by_all
from torch_models.sleep import check_awake
from torch_models.staging import DeviceStaging, Holds
from torch_models.storage import NAMES, host_view

if TYPE_CHECKING:
    from torch_models.model import Model


def parameters(model: Model) -> dict[str, nn.Parameter]:
    """Parameters by checkpoint name."""
    return {spec.name: model.get_parameter(spec.name) for spec in model.specs}


def update_weights_from_disk(
    model: Model, uri: str | os.PathLike[str], *, donate: bool = True, host_budget_bytes: int | None = None
) -> Model:
    """Reload all weights from another checkpoint of the same config, in place: no pointer moves.

    The checkpoint is checked whole before a byte is read, then read whole, parameter by parameter, to see that all of
    it can be; only then it is read again and written over the live parameters, each as it is complete, so that memory
    holds one of them twice at most. What was written is added up and compared at the end, and published. A failure
    before the first write leaves the old version serving; one after it (a device or disk fault, a file that changes
    between the two readings, an interrupt) makes the model refuse to run until a good load, which may also replace
    weights that an adapter did not leave as a whole. What another thread computes meanwhile raises when it is done. A
    model that was loaded with ``quantize`` quantises again.

    Args:
        model: the model to change.
        uri: the new checkpoint.
        donate: False, which in JAX keeps the old version beside the new one, is refused: there is one memory.
        host_budget_bytes: the most that is held on the host beside the live weights, one parameter at least; None: what
            the largest needs. What is on its way from files or stores comes on top: see ``Checkpoint.stream``.
    Raises:
        CheckpointError: listing everything that does not fit, or what could not be read before anything was written.
            The old weights serve on.
        ValueError: an adapter is merged into the weights, the budget is too small, or ``donate`` is False. Nothing was
            read.
        RuntimeError: writing failed half-way, or what was to be written could not be read again; or the model sleeps:
            wake it first, nothing was read.
    """

    def check() -> None:
        if not donate:
            raise ValueError("donate=False: PyTorch reloads in place and cannot keep the old version. Leave it out.")
        check_awake(model)
        if model.refusal is None:
            model.roster.check_unmerged("a reload")

    model.agreed("what is updated", check, lambda _: "the model")
    with DeviceStaging(model.device) as staging:
        return _reloaded(model, uri, host_budget_bytes, staging)


def _reloaded(
    model: Model, uri: str | os.PathLike[str], host_budget_bytes: int | None, staging: DeviceStaging
) -> Model:
    """See ``update_weights_from_disk``; both readings are into the same memory."""
    live = {name: NAMES.get(param.dtype, str(param.dtype)) for name, param in parameters(model).items()}
    parallel, mesh = model.parallel, model.mesh

    def tried() -> tuple[LoadPlan, LoadReport]:
        plan = plan_reload(open_to_load(uri, model.quantize), model.config, model.stage, live)
        held = None if parallel is None else parallel.held.boxes
        plan = plan.within(host_budget_bytes, staged=True, boxes_of=held)
        return plan, reading.dry_run(plan, parallel, staging)

    plan, report = together(mesh, tried)
    checkpoint = plan.checkpoint
    content = check_alike(mesh, "the checkpoint", checkpoint.fingerprint)
    filling = Filling(plan)
    # only under a refusal is one merged here: what was there before it goes, for from now on it would be a mixture
    model.room.unmerged, model.roster = {}, replace(model.roster, merged=None)

    def written() -> None:
        values = reading.read_params(filling, parallel, staging=staging)
        _commit(model, values, [spec.name for spec in plan.specs], staging)
        filling.finish(is_again=True)

    try:
        _together(model, written)
    except Exception as error:
        if model.refusal is None or not isinstance(error, CheckpointError):
            raise
        raise RuntimeError(f"{model.refusal}: {error} Update again with good weights.") from error
    model.checkpoint, model.config, model.specs, model.report = checkpoint, checkpoint.config, plan.specs, report
    model.publish(Event("reload", model.version + 1, str(checkpoint.source), content=content))
    return model


def write(model: Model, values: Iterable[tuple[str, torch.Tensor]], names: list[str]) -> None:
    """Write values over the live parameters ``names`` and verify them, without publishing.

    Raises:
        RuntimeError: it failed half-way, on a mesh on any rank; the model refuses to run.
    """

    def written() -> None:
        with DeviceStaging(model.device) as staging:
            _commit(model, values, names, staging)

    _together(model, written)


def _together(model: Model, work: Callable[[], None]) -> None:
    """On a mesh all of the ranks do it, or none of them runs any more; see ``torch_models.processes.together``."""
    mesh = model.mesh
    try:
        together(mesh, work)
    except Exception:
        told = {} if mesh is None else told_by_all(mesh, model.refusal or "")
        if refusals := [text for text in told.values() if text]:
            model.refusal = model.refusal or f"{refusals[0]} on another rank"
        raise


@torch.inference_mode(False)
@torch.no_grad()
def _commit(model: Model, values: Iterable[tuple[str, torch.Tensor]], names: list[str], staging: DeviceStaging) -> None:
    """Write values over the live parameters ``names`` and verify them. Until ``publish``, the model refuses to run."""
    before = pointer_census(model)
    frozen = [name for name in names if model.get_parameter(name).is_inference()]
    if frozen:
        raise RuntimeError(
            f"{frozen[0]} was made in torch.inference_mode() and can never be written. Nothing was changed."
        )
    written: dict[str, Holds] = {}
    for name, value in values:
        model.refusal = f"an update of {len(names)} parameters did not finish"
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        staging.send(value, module.get_parameter(leaf))
        mark_source(module, leaf)
        written[name] = staging.remembered(value)
        del value  # before the next one is read
    staging.let_go()
    derive(model)
    wrong = [name for name, holds in written.items() if not holds(stored(model, name))]
    wrong += moved(before, pointer_census(model))
    if wrong:
        model.refusal = f"an update left wrong bytes or moved storage in {', '.join(wrong[:5])}"
        raise RuntimeError(f"{model.refusal}. Do two of these parameters share storage?")


def stored(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter's values as the checkpoint has them, whatever its storage holds (see ``torch_models.derived``).

    Raises:
        RuntimeError: a part of it was written past ``update_weights_from_disk``, over what was derived.
    """
    owner, _, leaf = name.rpartition(".")
    return as_loaded(model.get_submodule(owner), leaf).detach()


def export(model: Model, directory: str | os.PathLike[str]) -> Path:
    """Write the checkpoint's tensors as they stand now, bit for bit; see ``loaders.writing.export.export_checkpoint``.

    Raises:
        RuntimeError: an update failed half-way, or another thread changed the weights meanwhile; a mixture of two
            versions is not written.
    """
    model.agreed("what is exported", model.check_runnable, lambda _: "the model")
    left_out = model.report.left_out if model.stage.count == 1 else ()
    if (parallel := model.parallel) is not None:
        return export_together(
            directory,
            model.checkpoint,
            model.specs,
            lambda name: to_host(parallel, name, stored(model, name)),
            left_out,
            is_writer=parallel.mesh.get_rank() == 0,
            together=partial(together, parallel.mesh),
        )

    def read(name: str) -> np.ndarray:
        return host_view(stored(model, name).cpu())

    return export_checkpoint(directory, model.checkpoint, model.specs, read, left_out, check=unchanged(model))


def tensor_reader(model: Model) -> TensorReader:
    """Any checkpoint tensor the model holds, by name, on the host in its stored dtype.

    On a mesh all ranks have to ask for the same, in the same order.
    """
    model.agreed("what is read", lambda: check_awake(model), lambda _: "the model")
    return TensorReader(model.checkpoint, model.specs, lambda name: to_host(model.parallel, name, stored(model, name)))


def weight_digests(model: Model) -> dict[str, str]:
    """Digest of every checkpoint tensor the model holds, by name.

    Raises:
        RuntimeError: as ``export``.
    """
    model.check_refusal()
    check = unchanged(model)
    found = digests(tensor_reader(model))
    check()
    return found
