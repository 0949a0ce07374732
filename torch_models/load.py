"""Checkpoint -> module: bytes straight into the memory of whole parameters."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
import torch
from torch import nn

from loaders import open_checkpoint
from loaders.events import Event
from loaders.families import FAMILIES
from loaders.plan import Filling, LoadPlan, LoadReport, compute_dtype, place_of, plan_load
from loaders.stage import Stage
from torch_models.derived import allocate_derived
from torch_models.model import Model
from torch_models.storage import DTYPES, host_view

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@torch.inference_mode(False)  # parameters outlive the caller's mode, and must stay writable
def load(
    uri: str | os.PathLike[str],
    dtype: Any = None,
    device: str | torch.device = "cpu",
    stage: tuple[int, int] | None = None,
    mtp: bool = False,
) -> Model:
    """Load a checkpoint.

    Parameters keep the checkpoint's dtypes; ``dtype`` is what is computed in.

    Args:
        uri: checkpoint directory.
        dtype: float32 or bfloat16 (name or torch.dtype); None: the checkpoint's own, float32 for a float16 one.
        device: where the parameters live.
        stage: (index, count) of a pipeline; None: the whole model.
        mtp: also load the checkpoint's multi-token-prediction draft (``mtp.*``), onto the last stage.
    Raises:
        CheckpointError: the checkpoint cannot be used; lists everything.
        ValueError: a dtype or stage that makes no sense.
    """
    checkpoint = open_checkpoint(uri)
    stage_ = Stage.of(stage, mtp=mtp)
    plan = plan_load(checkpoint, stage_)
    family = importlib.import_module(f"torch_models.{FAMILIES[checkpoint.config.architecture]}")
    build = vars(family)[checkpoint.config.architecture]
    model = build(checkpoint.config, stage_, COMPUTE_DTYPES[compute_dtype(dtype, plan)])
    table = {spec.name: spec.shape for spec in plan.specs}
    built = {name: tuple(param.shape) for name, param in model.named_parameters()}
    assert table == built, f"rule table and modules differ: {sorted(set(table.items()) ^ set(built.items()))[:5]}"
    weights, report = read_weights(plan, torch.device(device))
    for name, tensor in weights.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    allocate_derived(model, torch.device(device))
    model.checkpoint = checkpoint
    model.report = report
    model.publish(Event("load", 1, str(checkpoint.source)))
    return model


def read_weights(plan: LoadPlan, device: torch.device) -> tuple[dict[str, torch.Tensor], LoadReport]:
    """Read every planned tensor into new memory, by parameter name. Nothing that exists is touched.

    Raises:
        CheckpointError: a file changed or cannot be read, or a redundant tied tensor differs.
    """
    host: dict[str, torch.Tensor] = {}
    views: dict[str, np.ndarray] = {}
    placed: dict[str, torch.Tensor] = {}

    def destination(tensor: str) -> np.ndarray | None:
        if tensor not in plan.targets:
            return None
        spec, source = plan.targets[tensor]
        if spec.name not in host:
            host[spec.name] = torch.empty(spec.shape, dtype=DTYPES[plan.dtypes[spec.name]])
            views[spec.name] = host_view(host[spec.name])
        return place_of(views[spec.name], spec, source)

    filling = Filling(plan)
    stream = plan.checkpoint.stream(names=plan.tensors, into=destination)
    for spec, source, array, is_complete in filling.receive(stream):
        filling.write(views[spec.name], spec, source, array)
        if is_complete:
            del views[spec.name]
            placed[spec.name] = host.pop(spec.name).to(device)
    arrived = {same_as for same_as in plan.verified.values() if same_as in placed}
    report = filling.finish({same_as: host_view(placed[same_as].cpu()) for same_as in arrived})
    return placed, report
