"""Run as a program, once for each of two ranks, of which the second does not do its part: what the first is told."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from ranks import run_as_rank
from several import answer, error_of
from torch.distributed.device_mesh import init_device_mesh

import torch_models
from torch_models import coordination


def main(job: dict[str, Any], rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    ids = np.asarray(job["input_ids"])
    model, other = (torch_models.load(path, mesh=mesh) for path in job["checkpoints"])
    module, is_killed = model.get_submodule("model.layers.1.mlp"), job["how"] == "killed"

    def fails(*_: Any) -> None:
        if is_killed:
            answer(job, rank, {})
            os._exit(0)
        raise KeyboardInterrupt if job["how"] == "interrupted" else RuntimeError("out of memory")

    started = time.monotonic()
    if job["how"] == "late":
        coordination.WAIT_S = 3.0
        time.sleep(6.0 * rank)  # it does something else
    elif rank and job["how"] == "with its part done":
        head = model.head
        model.head = lambda x_BTD: fails(head(x_BTD))
    elif rank:
        module.register_forward_pre_hook(fails)
    try:
        first = error_of(lambda: model(ids))
    except KeyboardInterrupt:
        first = "KeyboardInterrupt"
    # no model of theirs waits: what nobody takes is on the wire of all of them
    told = [first, error_of(lambda: other(ids)), error_of(other.digests), error_of(model.sleep)]
    return {"told": told, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    run_as_rank(main)
