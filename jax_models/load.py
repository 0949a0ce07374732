"""Checkpoint -> Model: what is asked for is checked, then everything is read, by all processes of a mesh together."""

from __future__ import annotations

import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_models import reading
from jax_models.ambient import with_transfers
from jax_models.model import Model
from jax_models.processes import check_alike, together
from jax_models.programs import Programs, programs_for
from jax_models.sharding import usable_mesh
from jax_models.weights import flatten, unflatten
from loaders.events import Event
from loaders.quantization.quantize import open_to_load
from loaders.quantization.schemes import activations_of
from loaders.reading.filling import Filling
from loaders.reading.plan import LoadPlan, LoadReport, compute_dtype, plan_load
from loaders.stage import Stage

log = logging.getLogger(__name__)


@with_transfers
def load(
    uri: str | os.PathLike[str],
    dtype: Any = None,
    mesh: Mesh | None = None,
    stage: tuple[int, int] | None = None,
    *,
    mtp: bool = False,
    vision: bool = True,
    activation_quantization: bool | None = None,
    quantize: str | None = None,
    host_budget_bytes: int | None = None,
) -> Model:
    """Load a checkpoint.

    Parameters keep the checkpoint's dtypes; ``dtype`` is that of the computation.

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
            reload; see ``loaders.quantization.quantize``.
        host_budget_bytes: the most that is held on the host beside parameters that stay there, such as one parameter on
            its way to devices, or matrices that share a scale while they are quantised (which takes 8 MiB beside);
            None: what the largest needs. What is on its way from files or stores comes on top: see
            ``Checkpoint.stream``.
    Raises:
        CheckpointError: the checkpoint cannot be used; lists everything.
        ValueError: a dtype, mesh, stage or budget that makes no sense.
    """
    mesh = usable_mesh(mesh)

    def prepared() -> tuple[LoadPlan, Programs]:
        plan = plan_load(open_to_load(uri, quantize), Stage.of(stage, mtp=mtp, vision=vision))
        activations = activations_of(plan.checkpoint.config.quantization, activation_quantization)
        computed = jnp.dtype(compute_dtype(dtype, plan))
        held = reading.held_on(mesh, plan.checkpoint.config)
        plan = plan.within(host_budget_bytes, staged=not reading.stays_on_host(mesh), boxes_of=held)
        return plan, programs_for(plan.checkpoint.config, plan.stage, computed, mesh, activations)

    plan, programs = together(mesh, prepared)
    checkpoint = plan.checkpoint

    def said() -> str:
        asked = f"{programs.dtype.name} {plan.stage} {programs.activations} quantize={quantize}"
        return f"{checkpoint.fingerprint()} {asked}"

    content = check_alike(mesh, "what is loaded", said)
    table = {spec.name: spec.shape for spec in plan.specs}
    built = {name: leaf.shape for name, leaf in flatten(programs.abstract).items()}
    assert table == built, f"rule table and modules differ: {sorted(set(table.items()) ^ set(built.items()))[:5]}"

    def read() -> tuple[dict[str, jax.Array], LoadReport]:
        filling = Filling(plan)
        return dict(reading.read_params(filling, mesh)), filling.finish()

    weights, report = together(mesh, read)
    devices = {device for array in weights.values() for device in array.devices()}
    log.info("place: %d parameters on %s", len(weights), ", ".join(sorted(map(str, devices))))
    event = Event("load", 1, str(checkpoint.source), content=content)
    log.info("publish: version %d (%s)", event.version, event.kind)
    return Model(
        config=checkpoint.config,
        weights=unflatten(weights),
        version=event.version,
        programs=programs,
        quantize=quantize,
        stage=plan.stage,
        mesh=mesh,
        checkpoint=checkpoint,
        specs=plan.specs,
        report=report,
        events=(event,),
    )
