"""Sharded weights on disk with Orbax, as they are on the devices: saved by all processes, restored to any mesh.

Beside the arrays lies what a model is besides: version, events, the documents of the checkpoint it came from, and the
digest of every checkpoint tensor it holds, which must be found again. A save is complete or it is not there: it is
written beside the directory and renamed when it is finished (``jax_models.orbax_files``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_models.ambient import with_transfers
from jax_models.model import Model
from jax_models.processes import agreed, together
from jax_models.programs import programs_for
from jax_models.sharding import param_sharding, usable_mesh
from jax_models.weights import flatten, unflatten, weight_digests
from loaders.checkpoint import Checkpoint
from loaders.dtypes import to_numpy
from loaders.errors import CheckpointError, brief
from loaders.events import Event
from loaders.files.remembered import described, remembered
from loaders.quantization.schemes import Activations
from loaders.reading.plan import LoadReport, specs_of
from loaders.spec import Specs
from loaders.stage import Stage

FORMAT = 4
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of what Orbax writes


def save(model: Model, directory: str | os.PathLike[str]) -> None:
    """Write weights, version, digests, config and events to a directory that does not exist; see ``restore``.

    All processes of a mesh call this, and no other process has to; each writes its own part, to a directory that all of
    them see. An error of one is raised by all. Killed at any moment it leaves no such directory.

    Raises:
        FileExistsError: the directory is there, or is being saved to. What it holds is left as it is.
        ValueError: the model has adapters, the address takes a package that is not installed, or Orbax would not find
            again what has such a name.
    """
    from jax_models.orbax_files import write  # a second, which only those pay who save

    def checked() -> str:
        model.check_runnable()
        if model.roster.attached:
            names = ", ".join(repr(one.name) for one in model.roster.attached)
            lost = f"adapters are not saved, and {names} would be lost"
            first = "unmerge_lora and then " * (model.roster.merged is not None)
            raise ValueError(f"{lost}. Save the model that {first}detach_lora returns.")
        where = _address(directory)
        _check_new(where)
        return where

    where = model.agreed("what is saved", checked, lambda _: "the model")
    digests = weight_digests(model)
    document = {
        "format": FORMAT,
        "version": model.version,
        "events": [dataclasses.asdict(event) for event in model.events],
        "dtype": jnp.dtype(model.dtype).name,
        "stage": dataclasses.asdict(model.stage),
        "activations": model.programs.activations._asdict(),
        "quantize": model.quantize,
        "report": dataclasses.asdict(model.report),
        "checkpoint": described(model.checkpoint),
        "digests": digests,
    }
    document["digest"] = _digest(document)
    stacks = {spec.name for spec in model.specs if spec.axes[:1] == ("E",)}
    write(where, model.mesh, flatten(model.weights), document, stacks)


@with_transfers
def restore(directory: str | os.PathLike[str], mesh: Mesh | None = None, *, verify: bool = True) -> Model:
    """The model that ``save`` wrote, bit for bit, on any devices.

    What it was loaded from need not be there any more, unless tensors that it left out are to be exported.

    Args:
        directory: of the save.
        mesh: devices to shard over, as for ``load``; each process reads what its own devices hold, and an error of one
            is raised by all.
        verify: compare the digest of every tensor, for which a mesh of several processes gathers one after the other.
    Raises:
        CheckpointError: it is no complete save, or is damaged; names every damaged tensor.
        ValueError: a mesh that makes no sense, or has no device of this process.
    """
    mesh = usable_mesh(mesh)

    def said(found: tuple[str, dict[str, Any]]) -> str:
        return f"save {_digest(found[1])[:16]}, verify={verify}"

    where, document = agreed(mesh, "what is restored", lambda: _described(directory), said)
    checkpoint = remembered(document["checkpoint"])
    stage = Stage(**document["stage"])
    specs = specs_of(checkpoint.config, stage, checkpoint.tensors)
    dtype, activations = jnp.dtype(document["dtype"]), Activations(**document["activations"])
    event = Event("restore", document["version"], str(directory), content=_digest(document)[:16])
    model = Model(
        config=checkpoint.config,
        weights=together(mesh, lambda: _weights(where, checkpoint, specs, mesh)),
        version=document["version"],
        programs=programs_for(checkpoint.config, stage, dtype, mesh, activations),
        quantize=document["quantize"],
        stage=stage,
        mesh=mesh,
        checkpoint=checkpoint,
        specs=specs,
        report=LoadReport(**{key: _tupled(value) for key, value in document["report"].items()}),
        events=(*(Event(**{key: _tupled(value) for key, value in one.items()}) for one in document["events"]), event),
    )
    if verify:
        together(mesh, lambda: _check_digests(where, weight_digests(model), document["digests"]))
    return model


def _weights(where: str, checkpoint: Checkpoint, specs: Specs, mesh: Mesh | None) -> dict[str, Any]:
    from jax_models.orbax_files import UnreadableArrays, read_arrays

    dims = checkpoint.config.dims()
    wanted = {
        spec.name: jax.ShapeDtypeStruct(
            spec.shape,
            to_numpy(checkpoint.tensors[spec.placements[0].tensor].dtype),
            sharding=param_sharding(spec, dims, mesh) or jax.device_put(np.zeros(0)).sharding,
        )
        for spec in specs
    }
    try:
        flat = read_arrays(where, wanted)
    except UnreadableArrays as error:
        problems = [f"tensor {name!r} cannot be read: {_first_line(one)}" for name, one in error.errors.items()]
        raise CheckpointError(where, problems) from error
    except Exception as error:
        raise CheckpointError(where, [f"its arrays cannot be read: {_first_line(error)}"]) from error
    return unflatten(flat)


def _described(directory: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """Where a save lies, and what it says of the model."""
    where = _address(directory)
    return where, _document(where)


def _document(where: str) -> dict[str, Any]:
    from jax_models.orbax_files import read_document

    try:
        document = read_document(where)
    except ImportError as error:
        raise CheckpointError(where, [f"such an address takes a package that is not installed: {error}"]) from error
    except Exception as error:
        if "://" not in where and not os.path.exists(where):
            raise CheckpointError(where, ["there is nothing there, expected a directory that save wrote"]) from error
        why = _first_line(error).rstrip(".")
        problem = f"it is no complete save of a model ({why}). If it was cut short, restore an earlier one."
        raise CheckpointError(where, [problem]) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else document
        raise CheckpointError(where, [f"its format is {brief(found)}, expected {FORMAT}"])
    digest = document.pop("digest", None)
    if digest != _digest(document):
        raise CheckpointError(where, ["what it says of the model is damaged: it has another digest than when saved"])
    return document


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _check_digests(where: str, found: dict[str, str], expected: dict[str, str]) -> None:
    problems = [
        f"tensor {name!r} is damaged: its digest is {found.get(name, 'missing')}, expected {digest} as it was saved"
        for name, digest in expected.items()
        if found.get(name) != digest
    ]
    if problems:
        raise CheckpointError(where, problems)


def _address(directory: str | os.PathLike[str]) -> str:
    text = os.fspath(directory)
    return text if "://" in text else os.path.abspath(text)


def _check_new(where: str) -> None:
    from etils import epath

    if problem := _unusable(where):
        raise ValueError(f"{brief(where)} cannot be saved to: {problem}. Save to a directory of another name.")
    try:
        exists = epath.Path(where).exists()
    except ImportError as error:
        raise ValueError(f"{where} cannot be saved to: {error}. Install that, or save to a directory.") from error
    except KeyError as error:  # etils', of what it does not know
        raise ValueError(f"nothing is saved to {error.args[0]}. Save to a directory, s3:// or gs://.") from error
    if exists:
        raise FileExistsError(f"{where} exists. Save to a new directory, so that nothing already saved is lost.")


def _unusable(where: str) -> str | None:
    """Why nothing that is written there would be found again; None: it would."""
    if "\\" in where:
        return "TensorStore takes a backslash for the end of a directory's name"
    try:
        where.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    return "so Orbax names what is not finished" if UNFINISHED in os.path.basename(where.rstrip("/")) else None


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # Orbax says which slice it read, TensorStore what was wrong with the file
        error = error.__cause__
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__  # TensorStore adds its whole setup
