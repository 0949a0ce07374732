"""Checkpoint -> module: what is asked for is checked, then everything is read, by all ranks of a mesh together."""

from __future__ import annotations

import importlib
import logging
import os
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from loaders.events import Event
from loaders.families import FAMILIES
from loaders.quantization.quantize import open_to_load
from loaders.quantization.schemes import activations_of, has_nvfp4
from loaders.reading.filling import Filling
from loaders.reading.plan import LoadPlan, LoadReport, compute_dtype, plan_load
from loaders.stage import Stage
from torch_models import reading
from torch_models.derived import allocate_derived
from torch_models.layers.install import install, install_cache
from torch_models.model import Model
from torch_models.parallel import Parallel, check_mesh
from torch_models.processes import check_alike, together
from torch_models.staging import DeviceStaging
from torch_models.taps import name_modules

log = logging.getLogger(__name__)

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@torch.inference_mode(False)  # parameters outlive the caller's mode, and must stay writable
def load(
    uri: str | os.PathLike[str],
    dtype: Any = None,
    device: str | torch.device = "cpu",
    stage: tuple[int, int] | None = None,
    *,
    mtp: bool = False,
    vision: bool = True,
    activation_quantization: bool | None = None,
    quantize: str | None = None,
    kernel: str | None = None,
    host_budget_bytes: int | None = None,
    mesh: DeviceMesh | None = None,
) -> Model:
    """Load a checkpoint.

    Parameters keep the checkpoint's dtypes; ``dtype`` is that of the computation.

    Args:
        uri: the checkpoint's directory or address, see ``loaders.open_checkpoint``.
        dtype: float32 or bfloat16 (name or torch.dtype); None: the checkpoint's own, float32 for a float16 one.
        device: where the parameters live.
        stage: (index, count) of a pipeline; None: the whole model.
        mtp: also load the checkpoint's multi-token-prediction draft (``mtp.*``), onto the last stage.
        vision: load the vision tower of a model that has one (``visual.*``), onto the first stage; False: text alone.
        activation_quantization: None: inputs of quantised layers are quantised, and keys and values kept in FP8, if the
            checkpoint says so; False: neither is, weights only; True: inputs must be.
        quantize: ``"nvfp4"``: quantise the weights of an unquantised checkpoint while they are read, now and at every
            reload; see ``loaders.quantization.quantize``.
        kernel: what computes quantised products; see ``torch_models.kernels.choice``; None: the device's best.
        host_budget_bytes: the most that is held on the host beside parameters that stay there, such as one parameter on
            its way to a device, or matrices that share a scale while they are quantised (which takes 8 MiB beside);
            None: what the largest needs. What is on its way from files or stores comes on top: see
            ``Checkpoint.stream``.
        mesh: of all processes of torch.distributed, with axes named among ``expert`` and ``tensor``: each calls this,
            reads and holds its part, and an error of one is raised by all; see ``torch_models.parallel``.
    Raises:
        CheckpointError: the checkpoint cannot be used; lists everything.
        ValueError: a dtype, device, stage, kernel, budget or mesh that makes no sense.
    """
    if mesh is not None:
        check_mesh(mesh)

    def prepared() -> tuple[LoadPlan, Parallel | None, Model]:
        place = usable_device(device)
        plan = plan_load(open_to_load(uri, quantize), Stage.of(stage, mtp=mtp, vision=vision))
        parallel = None if mesh is None else Parallel(mesh, plan)
        held = None if parallel is None else parallel.held.boxes
        plan = plan.within(host_budget_bytes, staged=place.type != "cpu", boxes_of=held)
        return plan, parallel, _built(plan, dtype, place, activation_quantization, kernel)

    plan, parallel, model = together(mesh, prepared)
    checkpoint, model.quantize = plan.checkpoint, quantize

    def said() -> str:
        activations, kernels = (model.quantizes_inputs, model.rounds_cache), sorted(set(model.kernels.values()))
        cut = {} if mesh is None else dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))
        asked = f"{model.dtype} {plan.stage} {activations} quantize={quantize} {kernels} mesh={cut}"
        return f"{checkpoint.fingerprint()} {asked}"

    content = check_alike(mesh, "what is loaded", said)
    filling = Filling(plan)

    def read() -> LoadReport:
        with DeviceStaging(torch.device(device)) as staging:
            for name, value in reading.read_params(filling, parallel, staging=staging if plan.staged else None):
                owner, _, leaf = name.rpartition(".")
                param = nn.Parameter(staging.placed(value), requires_grad=False)
                setattr(model.get_submodule(owner), leaf, param)
                del value  # before the next one is read
        report = filling.finish()
        log.info("place: %d parameters on %s", len(plan.specs.params), device)
        if parallel is not None:
            model.parallel = parallel
            parallel.install(model)
        allocate_derived(model, torch.device(device))
        return report

    model.report = together(mesh, read)
    model.checkpoint = checkpoint
    model.publish(Event("load", 1, str(checkpoint.source), content=content))
    return model


def usable_device(device: str | torch.device) -> torch.device:
    """Raises ValueError: there is no such device here, or none whose memory can be read."""
    try:
        place = torch.device(device)
        torch.empty(1, device=place).cpu()  # "meta" has no memory to bring anything from
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"torch has no device {str(device)!r}: {why}. Expected cpu, cuda or cuda:N.") from error
    return place


def _built(
    plan: LoadPlan, dtype: Any, device: torch.device, activation_quantization: bool | None, kernel: str | None
) -> Model:
    """The model without storage. Raises ValueError for what makes no sense of what is asked for; see ``load``."""
    config, quantization = plan.checkpoint.config, plan.checkpoint.config.quantization
    activations = activations_of(quantization, activation_quantization)
    if kernel is not None and not has_nvfp4(quantization):
        raise ValueError(
            f"kernel={kernel!r} for a checkpoint without NVFP4 layers, that nothing would run. Leave it out."
        )
    family = importlib.import_module(f"torch_models.{FAMILIES[config.architecture]}")
    model = vars(family)[config.architecture](config, plan.stage, COMPUTE_DTYPES[compute_dtype(dtype, plan)])
    where = {"quantizes_inputs": activations.inputs, "kernel": kernel}
    model.kernels = install(model, plan.specs.schemes, device, **where)
    kv_cache = None if quantization is None else quantization.kv_cache
    install_cache(model, plan.specs, kv_cache, honoured=activations.cache)
    name_modules(model)
    model.specs = plan.specs
    model.quantizes_inputs, model.rounds_cache = activations
    table = {spec.name: spec.shape for spec in plan.specs}
    built = {name: tuple(param.shape) for name, param in model.named_parameters()}
    assert table == built, f"rule table and modules differ: {sorted(set(table.items()) ^ set(built.items()))[:5]}"
    return model
