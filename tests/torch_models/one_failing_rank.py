"""Run as a program, once for each of two ranks, of which the second fails alone: what both make of it, as JSON."""

from __future__ import annotations

import importlib
import os
import time
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from ranks import run_as_rank
from several import error_of
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import torch_models
from loaders import CheckpointError
from torch_models import staging
from torch_models.coordination import coordinator


def main(job: dict[str, Any], rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    first, second = job["checkpoints"]
    ids = np.asarray(job["input_ids"])
    falling = DeviceMesh("cpu", [1, 0], mesh_dim_names=("tensor",))
    found: dict[str, Any] = {"falling ranks": error_of(lambda: torch_models.load(first, mesh=falling))}
    found["bad checkpoint"] = error_of(lambda: torch_models.load("/nowhere" if rank else first, mesh=mesh))
    model = torch_models.load(first, mesh=mesh)
    logits = model(ids).numpy().copy()
    found["bad input"] = error_of(lambda: model(ids + 10**6)), error_of(lambda: model.generate(ids, max_new_tokens=-1))
    found["still in step"] = model(ids).numpy().tobytes() == logits.tobytes()

    reading, calls = importlib.import_module("torch_models.reading"), []
    plain = reading.read_params

    def reads_once(filling: Any, *args: Any, **options: Any) -> Any:
        calls.append(filling)
        if len(calls) == 2 and rank:
            raise CheckpointError(filling.plan.checkpoint.source, ["the disk is gone"])
        return plain(filling, *args, **options)

    with patch.object(reading, "read_params", reads_once):
        found["half an update"] = error_of(lambda: model.update_weights_from_disk(second))
    found["of two versions"] = error_of(lambda: model(ids))
    model.update_weights_from_disk(first)
    found["updated again"] = model(ids).numpy().tobytes() == logits.tobytes()

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the device is gone")

    embed, _ = model.get_embed_and_head()
    table = torch.ones(model.config.vocab_size, model.config.hidden_size, dtype=embed.dtype)
    with patch.object(staging, "_sums", broken if rank else staging._sums):
        found["half a swap"] = error_of(lambda: model.set_embed_and_head(table))
    found["of two tables"] = error_of(lambda: model(ids))
    model.update_weights_from_disk(first)
    found["brought back"] = model(ids).numpy().tobytes() == logits.tobytes()

    def slowly() -> None:
        with coordinator().call():
            time.sleep(2.5 * rank)
            coordinator().finish(dist.all_reduce(torch.ones(1), async_op=True), "cpu")

    def badly() -> None:
        with coordinator().call():
            raise ValueError("bad input of all")

    # who waits in a call is told nothing of the one before, which failed everywhere
    found["two calls"] = error_of(badly), error_of(slowly)

    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    if rank:
        model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(fails)
    started = time.monotonic()
    found["in the middle"] = error_of(lambda: model(ids))
    found["seconds"] = time.monotonic() - started
    found["out of step"] = error_of(lambda: model(ids)), error_of(lambda: model.generate(ids, max_new_tokens=2))
    found["out of step"] += error_of(model.sleep), error_of(lambda: model.update_weights_from_disk(first))
    found["out of step"] += (error_of(lambda: torch_models.load(first, mesh=mesh)),)
    return found


if __name__ == "__main__":
    run_as_rank(main)
    os._exit(0)  # nobody comes to say goodbye
