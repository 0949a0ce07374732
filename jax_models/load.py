"""Checkpoint -> Model: bytes straight into host buffers, each handed to its devices once.

On a mesh a buffer is the part of a parameter that a device holds, and only what lies in those is read: a process with a
quarter of the devices reads about a quarter of the checkpoint.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

from jax_models.model import Model
from jax_models.processes import check_alike, check_here, together
from jax_models.programs import Programs, programs_for
from jax_models.sharding import param_spec, usable_mesh
from jax_models.weights import flatten
from loaders.events import Event
from loaders.filling import Filling
from loaders.plan import LoadPlan, LoadReport, compute_dtype, plan_load
from loaders.quantize import activations_of, open_to_load
from loaders.regions import Box, box_of
from loaders.scratch import Staging
from loaders.shards import Shards, read_shards
from loaders.spec import Dim, ParamSpec
from loaders.stage import Stage
from loaders.whole import read_whole

log = logging.getLogger(__name__)


def load(
    uri: str | os.PathLike[str],
    dtype: Any = None,
    mesh: Mesh | None = None,
    stage: tuple[int, int] | None = None,
    mtp: bool = False,
    *,
    vision: bool = True,
    activation_quantization: bool | None = None,
    quantize: str | None = None,
    host_budget_bytes: int | None = None,
) -> Model:
    """Load a checkpoint.

    Parameters keep the checkpoint's dtypes; ``dtype`` is what is computed in.

    Args:
        uri: the checkpoint's directory or address, see ``loaders.open_checkpoint``.
        dtype: float32 or bfloat16; None: the checkpoint's own, float32 for a float16 one.
        mesh: devices to shard over, with axes among ``data``, ``expert``, ``tensor``, ``fsdp``; None: the default
            device. Of several processes each calls this, and reads what its own devices hold; an error of one is raised
            by all.
        stage: (index, count) of a pipeline; None: the whole model.
        mtp: also load the checkpoint's multi-token-prediction draft (``mtp.*``), onto the last stage.
        vision: load the vision tower of a model that has one (``visual.*``), onto the first stage; False: text alone.
        activation_quantization: None: inputs of quantised layers are quantised, and keys and values kept in FP8, if the
            checkpoint says so; False: neither is, weights only; True: inputs must be.
        quantize: ``"nvfp4"``: quantise the weights of an unquantised checkpoint while they are read, now and at every
            reload; see ``loaders.quantize``.
        host_budget_bytes: the most that is held on the host beside parameters that stay there, such as one parameter on
            its way to devices; None: what the largest needs.
    Raises:
        CheckpointError: the checkpoint cannot be used; lists everything.
        ValueError: a dtype, mesh, stage or budget that makes no sense.
    """
    given = mesh
    mesh = together(given if isinstance(given, Mesh) and given.size else None, lambda: usable_mesh(given))
    check_here(mesh)

    def prepared() -> tuple[LoadPlan, Programs]:
        plan = plan_load(open_to_load(uri, quantize), Stage.of(stage, mtp=mtp, vision=vision))
        activations = activations_of(plan.checkpoint, activation_quantization)
        computed = jnp.dtype(compute_dtype(dtype, plan))
        plan = plan.within(host_budget_bytes, staged=not stays_on_host(mesh))
        return plan, programs_for(plan.checkpoint.config, plan.stage, computed, mesh, activations)

    plan, programs = together(mesh, prepared)
    checkpoint = plan.checkpoint

    def said() -> str:
        asked = f"{programs.dtype.name} {plan.stage} {programs.activations} quantize={quantize}"
        return f"{checkpoint.fingerprint()} {asked}"

    check_alike(mesh, "what is loaded", said)
    table = {spec.name: spec.shape for spec in plan.specs}
    built = {name: leaf.shape for name, leaf in flatten(programs.abstract).items()}
    assert table == built, f"rule table and modules differ: {sorted(set(table.items()) ^ set(built.items()))[:5]}"

    def read() -> tuple[dict[str, jax.Array], LoadReport]:
        filling = Filling(plan)
        return dict(read_params(plan, filling, mesh)), filling.finish()

    weights, report = together(mesh, read)
    devices = {device for array in weights.values() for device in array.devices()}
    log.info("place: %d parameters on %s", len(weights), ", ".join(sorted(map(str, devices))))
    return Model(
        config=checkpoint.config,
        weights=traverse_util.unflatten_dict(weights, sep="."),
        version=1,
        programs=programs,
        quantize=quantize,
        stage=plan.stage,
        mesh=mesh,
        checkpoint=checkpoint,
        specs=plan.specs,
        report=report,
        events=(Event("load", 1, str(checkpoint.source)),),
    )


def stays_on_host(mesh: Mesh | None) -> bool:
    """Whether the memory that is read into becomes the parameters: on a CPU, if it is one device."""
    devices = jax.device_put(0).devices() if mesh is None else set(mesh.devices.flat)
    return len(devices) == 1 and all(device.platform == "cpu" for device in devices)


def read_params(plan: LoadPlan, filling: Filling, mesh: Mesh | None) -> Iterator[tuple[str, jax.Array]]:
    """Read every planned parameter and place it, one after the other as they are complete. None is kept.

    On CPU the buffers read into become the parameters without a copy (64-byte aligned, never written again).

    Raises:
        CheckpointError: a file changed or cannot be read, or a tensor that was not asked for.
    """
    dims = plan.checkpoint.config.dims()
    if mesh is not None:
        for spec, shards in read_shards(plan, filling, partial(boxes_of, dims=dims, mesh=mesh)):
            yield spec.name, assembled(spec, shards, dims, mesh)
        return
    for spec, param in read_whole(plan, filling):
        array = jax.device_put(param)
        del param  # the next ones are read while the caller has this one
        # committed to where it is, also without a mesh: jit compiles again when a later array is and this is not
        yield spec.name, jax.device_put(array, array.sharding)


def read_in_vain(plan: LoadPlan, mesh: Mesh | None) -> None:
    """Read everything that ``read_params`` would, on the host only: whatever is wrong with it is raised."""
    filling = Filling(plan)
    if mesh is None:
        deque(read_whole(plan, filling, staging=Staging()), maxlen=0)  # a loop would keep one while it reads the next
    else:
        dims = plan.checkpoint.config.dims()
        deque(read_shards(plan, filling, partial(boxes_of, dims=dims, mesh=mesh), staging=Staging()), maxlen=0)
    filling.finish()


def boxes_of(spec: ParamSpec, *, dims: dict[str, Dim], mesh: Mesh) -> set[Box]:
    """The parts of a parameter that this process's devices hold."""
    sharding = NamedSharding(mesh, param_spec(spec, dims, mesh))
    indices = sharding.addressable_devices_indices_map(spec.shape).values()
    return {box_of(index or (), spec.shape) for index in indices}


def assembled(spec: ParamSpec, shards: Shards, dims: dict[str, Dim], mesh: Mesh) -> jax.Array:
    """A parameter of its shards here, each put on the devices that hold it; on CPU they are its memory."""
    sharding = NamedSharding(mesh, param_spec(spec, dims, mesh))
    indices = sharding.addressable_devices_indices_map(spec.shape)
    arrays = [jax.device_put(shards[box_of(index or (), spec.shape)], device) for device, index in indices.items()]
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, arrays)
