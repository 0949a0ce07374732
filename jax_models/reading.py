"""Parameters of a plan, read into host buffers, each handed to its devices once.

On a mesh a buffer is the part of a parameter that a device holds, and only what lies in those is read: a process with a
quarter of the devices reads about a quarter of the checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator

import jax
from jax.sharding import Mesh, NamedSharding

from jax_models.sharding import param_spec
from loaders.reading.filling import Filling
from loaders.reading.plan import BoxesOf, LoadPlan
from loaders.reading.regions import Box, box_of
from loaders.reading.scratch import Staging
from loaders.reading.shards import Shards, read_shards
from loaders.reading.whole import read_whole
from loaders.spec import Dim, ModelConfig, ParamSpec


def stays_on_host(mesh: Mesh | None) -> bool:
    """Whether the memory that is read into becomes the parameters: on a CPU, if it is one device."""
    devices = jax.device_put(0).devices() if mesh is None else set(mesh.devices.flat)
    return len(devices) == 1 and all(device.platform == "cpu" for device in devices)


def read_params(filling: Filling, mesh: Mesh | None) -> Iterator[tuple[str, jax.Array]]:
    """Read every parameter that was planned and place it, one after the other as they are complete. None is kept.

    On CPU the buffers read into become the parameters without a copy (64-byte aligned, never written again).

    Raises:
        CheckpointError: a file changed or cannot be read, or a tensor that was not asked for.
    """
    if mesh is not None:
        dims = filling.plan.checkpoint.config.dims()
        for spec, shards in read_shards(filling):
            yield spec.name, assembled(spec, shards, dims, mesh)
        return
    for spec, param in read_whole(filling):
        array = jax.device_put(param)
        del param  # the next ones are read while the caller has this one
        # committed to where it is, also without a mesh: jit compiles again when a later array is and this is not
        yield spec.name, jax.device_put(array, array.sharding)


def dry_run(plan: LoadPlan, mesh: Mesh | None) -> None:
    """Read everything that ``read_params`` would, on the host only: whatever is wrong with it is raised.

    Raises:
        CheckpointError: as ``read_params``; or not everything arrived, or does not go together.
    """
    filling = Filling(dataclasses.replace(plan, phase="check"))
    read = read_whole if mesh is None else read_shards
    deque(read(filling, staging=Staging()), maxlen=0)  # a loop would keep one while it reads the next
    filling.finish()


def held_on(mesh: Mesh | None, config: ModelConfig) -> BoxesOf | None:
    """The parts of a parameter that this process's devices hold; None: all of it."""
    if mesh is None:
        return None
    dims = config.dims()

    def boxes_of(spec: ParamSpec) -> set[Box]:
        sharding = NamedSharding(mesh, param_spec(spec, dims, mesh))
        indices = sharding.addressable_devices_indices_map(spec.shape).values()
        return {box_of(index or (), spec.shape) for index in indices}

    return boxes_of


def assembled(spec: ParamSpec, shards: Shards, dims: dict[str, Dim], mesh: Mesh) -> jax.Array:
    """A parameter of its shards here, each put on the devices that hold it; on CPU they are its memory."""
    sharding = NamedSharding(mesh, param_spec(spec, dims, mesh))
    indices = sharding.addressable_devices_indices_map(spec.shape)
    arrays = [jax.device_put(shards[box_of(index or (), spec.shape)], device) for device, index in indices.items()]
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, arrays)
