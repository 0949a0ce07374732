"""Run as a program, once for each rank of a mesh: all that happens to a weight, and what came of it as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks import part, run_as_rank
from several import BytesRead, error_of
from torch.distributed.device_mesh import init_device_mesh

import torch_models
from torch_models.census import moved, pointer_census


def main(job: dict[str, Any], rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", tuple(job["axes"].values()), mesh_dim_names=tuple(job["axes"]))
    read = BytesRead()
    first, second = job["checkpoints"]
    work = Path(job["directory"])
    inputs = {name: np.asarray(value) for name, value in job["inputs"].items()}
    found: dict[str, Any] = {}
    model = torch_models.load(first, mesh=mesh, **job["options"])
    found["held"] = sum(param.nbytes for param in model.parameters()) / model.report.num_bytes
    found["read"] = read.count / model.report.num_bytes
    logits = model(**inputs).numpy().copy()
    found["tokens"] = model.generate(**inputs, max_new_tokens=4, ignore_eos=True).tolist()
    found["one by one"] = model.generate(inputs["input_ids"][2:3], max_new_tokens=4, ignore_eos=True).tolist()
    found["digests"] = model.digests()
    embed, head = model.get_embed_and_head()
    full = embed.full_tensor().clone()
    found["embed"] = list(embed.shape) == list(full.shape)
    before = pointer_census(model)
    model.set_embed_and_head(embed, head)
    found["its own"] = [model.version, len(model.events)]
    model.set_embed_and_head(full.flip(0), None if model.config.tie_word_embeddings else head)
    swapped, _ = model.get_embed_and_head()
    found["a part of it"] = error_of(lambda: model.set_embed_and_head(swapped[: len(swapped) // 2]))
    if model.config.tie_word_embeddings:
        found["an old head"] = error_of(lambda: model.set_embed_and_head(full, head))
    found["swapped"] = torch.equal(model.get_embed_and_head()[0].full_tensor(), full.flip(0))
    model.update_weights_from_disk(second)
    found["moved"] = moved(before, pointer_census(model))
    changed = model(**inputs).numpy().copy()
    found["changed digests"] = model.digests()
    found["bad on one"] = error_of(lambda: model.update_weights_from_disk(job["bad"] if rank else first))
    found["still serving"] = model(**inputs).numpy().tobytes() == changed.tobytes()
    model.export(work / "export")
    found["export again"] = error_of(lambda: model.export(work / "export"))
    found["graphs"] = error_of(lambda: model.generate(**inputs, graphs=True))
    found["taps"] = error_of(lambda: model.with_taps(**inputs, level="operations"))
    _, taps = model.with_taps(**inputs, level="modules")
    injected, _ = model.with_taps(**inputs, inject={job["tap"].replace("layers.0", "layers.1"): taps[job["tap"]]})
    model.update_weights_from_disk(first)
    found["back"] = model(**inputs).numpy().tobytes() == logits.tobytes()
    model.sleep().wake()
    found["slept"] = model(**inputs).numpy().tobytes() == logits.tobytes()
    if rank == 0:
        np.savez(work / "logits.npz", logits=logits, changed=changed, injected=injected.numpy(), **taps)
    return found


if __name__ == "__main__":
    run_as_rank(main)
    part()
