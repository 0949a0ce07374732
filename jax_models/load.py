"""Checkpoint -> Model: bytes straight into host buffers of whole parameters, each handed to its devices once."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from jax_models.model import Model
from jax_models.programs import Weights, programs_for
from jax_models.sharding import param_sharding, usable_mesh
from jax_models.weights import flatten
from loaders import open_checkpoint
from loaders.checkpoint import aligned_empty
from loaders.dtypes import to_numpy
from loaders.events import Event
from loaders.plan import Filling, LoadPlan, LoadReport, compute_dtype, place_of, plan_load
from loaders.stage import Stage


def load(
    uri: str | os.PathLike[str],
    dtype: Any = None,
    mesh: Mesh | None = None,
    stage: tuple[int, int] | None = None,
    mtp: bool = False,
) -> Model:
    """Load a checkpoint.

    Parameters keep the checkpoint's dtypes; ``dtype`` is what is computed in.

    Args:
        uri: checkpoint directory.
        dtype: float32 or bfloat16; None: the checkpoint's own, float32 for a float16 one.
        mesh: devices to shard over, with axes among ``data``, ``expert``, ``tensor``; None: the default device.
        stage: (index, count) of a pipeline; None: the whole model.
        mtp: also load the checkpoint's multi-token-prediction draft (``mtp.*``), onto the last stage.
    Raises:
        CheckpointError: the checkpoint cannot be used; lists everything.
        ValueError: a dtype, mesh or stage that makes no sense.
    """
    mesh = usable_mesh(mesh)
    checkpoint = open_checkpoint(uri)
    stage_ = Stage.of(stage, mtp=mtp)
    plan = plan_load(checkpoint, stage_)
    programs = programs_for(checkpoint.config, stage_, jnp.dtype(compute_dtype(dtype, plan)), mesh)
    table = {spec.name: spec.shape for spec in plan.specs}
    built = {name: leaf.shape for name, leaf in flatten(programs.abstract).items()}
    assert table == built, f"rule table and modules differ: {sorted(set(table.items()) ^ set(built.items()))[:5]}"
    weights, report = read_weights(plan, mesh)
    return Model(
        config=checkpoint.config,
        weights=weights,
        version=1,
        programs=programs,
        stage=stage_,
        mesh=mesh,
        checkpoint=checkpoint,
        report=report,
        events=(Event("load", 1, str(checkpoint.source)),),
    )


def read_weights(plan: LoadPlan, mesh: Mesh | None) -> tuple[Weights, LoadReport]:
    """Read every planned tensor into a new weight tree. Nothing that exists is touched.

    On CPU the buffers read into become the parameters without a copy (64-byte aligned, never written again).

    Raises:
        CheckpointError: a file changed or cannot be read, or a redundant tied tensor differs.
    """
    dims = plan.checkpoint.config.dims()
    host: dict[str, np.ndarray] = {}
    placed: dict[str, jax.Array] = {}

    def destination(tensor: str) -> np.ndarray | None:
        if tensor not in plan.targets:
            return None
        spec, source = plan.targets[tensor]
        if spec.name not in host:
            host[spec.name] = aligned_empty(spec.shape, to_numpy(plan.dtypes[spec.name]))
        return place_of(host[spec.name], spec, source)

    filling = Filling(plan)
    stream = plan.checkpoint.stream(names=plan.tensors, into=destination)
    for spec, source, array, is_complete in filling.receive(stream):
        filling.write(host[spec.name], spec, source, array)
        if is_complete:
            array = jax.device_put(host.pop(spec.name), param_sharding(spec, dims, mesh))
            # committed to where it is, also without a mesh: jit compiles again when a later array is and this is not
            placed[spec.name] = jax.device_put(array, array.sharding)
    arrived = {same_as for same_as in plan.verified.values() if same_as in placed}
    report = filling.finish({same_as: np.asarray(placed[same_as]) for same_as in arrived})
    return traverse_util.unflatten_dict(placed, sep="."), report
