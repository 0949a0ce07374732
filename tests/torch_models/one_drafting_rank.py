"""Run as a program, once for each rank of a mesh: what a draft says there, and what it is worth, as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ranks import part, run_as_rank
from several import error_of
from torch.distributed.device_mesh import init_device_mesh

import torch_models


def main(job: dict[str, Any], rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", tuple(job["axes"].values()), mesh_dim_names=tuple(job["axes"]))
    first, second = job["checkpoints"]
    inputs = {name: np.asarray(value) for name, value in job["inputs"].items()}
    found: dict[str, Any] = {}
    model = torch_models.load(first, mesh=mesh, mtp=True)
    draft = model.draft
    options = {"max_new_tokens": 12, "ignore_eos": True, "draft": draft}

    def generated(**more: Any) -> tuple[Any, list[int]]:
        tokens = model.generate(**inputs, **options, **more).tolist()
        return tokens, [draft.report.rounds, draft.report.accepted]

    found["held"] = sum(param.nbytes for param in model.parameters()) / model.report.num_bytes
    said = [part.numpy() for part in model.mtp_forward(**inputs)]
    found["greedy"] = generated()
    found["sampled"] = generated(temperature=0.8, seed=3)
    model.attach_lora(job["adapter"])
    found["adapted"] = generated()
    model.detach_lora()
    found["detached"] = generated()
    found["digests"] = model.digests()
    # another model's draft, and a call in which all fail, after which ranks that wait look for errors of that one alone
    other = torch_models.load(second, mesh=mesh, mtp=True)
    found["bad input"] = error_of(lambda: other(inputs["input_ids"] + 10**6))
    draft = options["draft"] = other.draft.bind(model)
    found["of another"] = generated()
    plain = torch_models.load(first, mtp=True)
    found["bound across"] = [error_of(lambda: model.draft.bind(plain)), error_of(lambda: plain.draft.bind(model))]
    model.update_weights_from_disk(second)
    draft = options["draft"] = model.draft
    found["updated"] = generated()
    if rank == 0:
        np.savez(Path(job["directory"]) / "said.npz", *said)
    return found


if __name__ == "__main__":
    run_as_rank(main)
    part()
