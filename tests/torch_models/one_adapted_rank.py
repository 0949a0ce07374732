"""Run as a program, once for each rank of a mesh: adapters come, run, are merged and go; what came of it as JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from ranks import run_as_rank
from several import error_of
from torch.distributed.device_mesh import init_device_mesh

import torch_models
from torch_models import adapter_room, adapters
from torch_models.census import moved, pointer_census


def main(job: dict[str, Any], rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", tuple(job["axes"].values()), mesh_dim_names=tuple(job["axes"]))
    first, second = job["checkpoints"]
    a, b, c = job["adapters"]
    work, rows = Path(job["directory"]), ["a", None, "b", "a"]
    inputs = {name: np.asarray(value) for name, value in job["inputs"].items()}
    found: dict[str, Any] = {}
    model = torch_models.load(first, mesh=mesh)
    said = {"base": model(**inputs).numpy().copy()}
    before = pointer_census(model)
    model.attach_lora(a, "a").attach_lora(b, "b")
    said["mixed"] = model(**inputs, adapter=rows).numpy().copy()
    found["tokens"] = model.generate(**inputs, adapter=rows, max_new_tokens=4, ignore_eos=True).tolist()
    found["nowhere on one"] = error_of(lambda: model.attach_lora("/nowhere" if rank else b, "c"))
    found["different"] = error_of(lambda: model.attach_lora(c if rank else b, "b"))

    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with patch.object(adapter_room, "_fill", fails if rank else adapter_room._fill):
        found["no room on one"] = error_of(lambda: model.detach_lora("b"))  # there is room for less, in place
        found["no room on one"] += error_of(lambda: model.attach_lora(c, "b"))
    put, puts = adapter_room._put, iter(range(10**6))

    def fails_once(*args: Any) -> None:
        if next(puts) == 4:
            raise RuntimeError("out of memory")
        put(*args)

    with patch.object(adapter_room, "_put", fails_once if rank else put):
        found["half written on one"] = error_of(lambda: model.detach_lora("b"))
    found["other names"] = error_of(lambda: model.detach_lora("a" if rank else "b"))
    found["still serving"] = model(**inputs, adapter=rows).numpy().tobytes() == said["mixed"].tobytes()
    model.attach_lora(c, "b")
    said["in its place"] = model(**inputs).numpy().copy()
    model.update_weights_from_disk(second)
    said["reloaded"] = model(**inputs, adapter=rows).numpy().copy()
    model.update_weights_from_disk(first)
    found["digests"] = [model.digests()]
    found["merge"] = error_of(lambda: model.merge_lora("a"))
    if found["merge"] == "none":
        found["digests"].append(model.digests())
        said["merged"] = model(**inputs).numpy().copy()
        model.export(work / "export")
        model.unmerge_lora()
    model.detach_lora("a").detach_lora("b")
    found["detached"] = model(**inputs).numpy().tobytes() == said["base"].tobytes()
    found["detached"] &= model.digests() == found["digests"][0]
    found["moved"] = moved(before, pointer_census(model))
    alone = model.attach_lora(a, "a")(**inputs).numpy().copy()
    found["slept"] = model.sleep().wake()(**inputs).numpy().tobytes() == alone.tobytes()
    with patch.object(adapters, "of_host", fails if rank else adapters.of_host):
        found["merge failed on one"] = error_of(lambda: model.merge_lora("a"))
    found["untouched"] = model.refusal is None and model.events[-1].kind == "attach"
    if rank == 0:
        np.savez(work / "logits.npz", **said)
    return found


if __name__ == "__main__":
    run_as_rank(main)
    os._exit(0)  # nobody comes to say goodbye
