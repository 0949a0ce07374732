"""Run as a program, once for each of two ranks of a mesh: what one of them does wrong, or otherwise, alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from ranks import run_as_rank
from several import error_of
from torch.distributed.device_mesh import init_device_mesh

import torch_models
from parity.zoo.adapters import make_adapter
from parity.zoo.pictures import pictures


def main(job: dict[str, Any], rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    first, second, adapter = job["checkpoints"][0], job["checkpoints"][1], job["adapters"][0]
    inputs = {name: np.asarray(value) for name, value in job["inputs"].items()}
    found: dict[str, Any] = {}
    axes = init_device_mesh("cpu", (2,), mesh_dim_names=(("tensor", "expert")[rank],))
    found["other axes"] = error_of(lambda: torch_models.load(first, mesh=axes))
    found["other config"] = error_of(lambda: torch_models.load(job["other"] if rank else first, mesh=mesh))
    found["other dtype"] = error_of(lambda: torch_models.load(first, "bfloat16" if rank else None, mesh=mesh))
    for what, option in (job["options"] | job["kernels"]).items():
        path = job["aligned"] if what in job["kernels"] else first
        found[what] = error_of(lambda path=path, option=option: torch_models.load(path, mesh=mesh, **option[rank]))
    model = torch_models.load(first, mesh=mesh).attach_lora(adapter, "a")
    before = model(**inputs).numpy().tobytes()
    shared = model.get_embed_and_head()[0]
    embed = shared.full_tensor().clone()
    turned = embed.flip(0)
    embeds = np.ones((*inputs["input_ids"].shape, model.config.hidden_size), np.float32)
    seeing = torch_models.load(job["seeing"], mesh=mesh)
    shown = pictures(seeing.config)
    pixels, grid = shown["pixel_values"], shown["image_grid_thw"]
    drafting = torch_models.load(job["drafting"], mesh=mesh, mtp=True)
    drafting.attach_lora(make_adapter(job["drafting"], f"{job['directory']}/of {rank}"), "a")
    redrafting = torch_models.load(job["drafting"], mesh=mesh, mtp=True).update_weights_from_disk(job["drafting"])
    merged = torch_models.load(first, mesh=mesh).attach_lora(adapter, "a").merge_lora("a")
    last = torch_models.load(first, mesh=mesh, stage=(1, 2))
    other, like = (torch_models.load(path, mesh=mesh) for path in (second, first))
    begun = [model.prefill(rows)[1] for rows in (inputs["input_ids"], inputs["input_ids"][::-1])]
    gone_on = [model.decode(token, model.prefill(**inputs)[1])[1] for token in (np.array([3, 5]), np.array([5, 3]))]
    many = np.full((1000, 2), 101)
    last_row = np.where(np.arange(len(many)) == len(many) - 1, 101 + rank, 101)
    ids = inputs["input_ids"] % drafting.config.vocab_size
    calls = {
        "other pixels": lambda: seeing.get_image_features(pixels + rank, grid),
        "fewer pixels": lambda: seeing.get_image_features(pixels[rank:], grid),
        "what a draft says": lambda: drafting.mtp_forward(ids[:, : 8 + rank]),
        "a draft": lambda: drafting.generate(ids, **{"draft": drafting.draft} if rank else {}),
        "other weights": lambda: model.update_weights_from_disk(second if rank else first),
        "a short embedding": lambda: model.set_embed_and_head(turned[:-1] if rank else turned),
        "another embedding": lambda: model.set_embed_and_head(turned if rank else embed),
        "half of it": lambda: model.set_embed_and_head(embed if rank else shared),
        "a token": lambda: model(**inputs | {"input_ids": inputs["input_ids"] + 10_000 * rank}),
        "another prompt": lambda: model(
            **inputs | {"input_ids": inputs["input_ids"][::-1] if rank else inputs["input_ids"]}
        ),
        "rows of a call": lambda: model(**inputs, adapter=["a", (None, "a")[rank]]),
        "other room": lambda: model.prefill(**inputs, max_new_tokens=4 + 400 * rank),
        "other rows": lambda: model.prefill(**inputs, adapter=["a", (None, "a")[rank]]),
        "a level": lambda: model.with_taps(**inputs, level=("layers", "modules")[rank]),
        "what goes in": lambda: model.with_taps(**inputs, inject={f"model.layers.{rank}": embeds}),
        "other hidden states": lambda: last(hidden_states=embeds + rank),
        "rows of a draft": lambda: drafting.generate(ids, adapter=["a", (None, "a")[rank]], draft=drafting.draft),
        "other values": lambda: model.with_taps(**inputs, inject={"model.norm": embeds * (1 + rank)}),
        "another cache": lambda: model.decode(np.array([3, 5]), begun[rank]),
        "another history": lambda: model.decode(np.array([3, 5]), gone_on[rank]),
        "another token": lambda: model.decode(np.array([3 + rank, 5]), model.prefill(**inputs, max_new_tokens=4)[1]),
        "other checkpoints": lambda: (other if rank else like)(**inputs),
        "other models updated": lambda: (other if rank else model).update_weights_from_disk(second),
        "other models swapped": lambda: (other if rank else model).set_embed_and_head(turned),
        "other models adapted": lambda: (other if rank else model).attach_lora(adapter, "z"),
        "a draft of others": lambda: (redrafting.draft.bind(drafting) if rank else drafting.draft)(ids),
        "another function": lambda: model.digests() if rank else model.export(f"{job['directory']}/export"),
        "asleep or awake": lambda: model.sleep() if rank else model.wake(),
        "graphs": lambda: model.generate(**inputs, graphs=bool(rank)),
        "no cache": lambda: model.decode(np.array([3, 5]), None if rank else begun[0]),
        "not merged": lambda: (model if rank else merged).unmerge_lora(),
        "merged": lambda: (merged if rank else model).update_weights_from_disk(second),
        "other models": lambda: (other if rank else model)(**inputs),
        "other models in steps": lambda: (other if rank else model).prefill(**inputs),
        "other models exported": lambda: (other if rank else model).export(f"{job['directory']}/export"),
        "other models read": lambda: (other if rank else model).digests(),
        "the last of many tokens": lambda: model.decode(last_row, model.prefill(many, max_new_tokens=4)[1]),
        "a seed": lambda: model.generate(**inputs, temperature=1.0, seed=rank),
        "kept beside": lambda: model.update_weights_from_disk(second, donate=not rank),
        "an end": lambda: model.generate(**inputs, ignore_eos=bool(rank)),
        "a name that is no UTF-8": lambda: model.attach_lora("/gr\udcfc" if rank else adapter, "a"),
        "no adapter": lambda: model.attach_lora(job["other"] if rank else adapter, "a"),
        "another adapter": lambda: model.attach_lora(job["adapters"][rank], "a"),
        "another name": lambda: model.attach_lora(adapter, "ab"[rank]),
        "detach": lambda: model.detach_lora("ab"[rank]),
        "merge": lambda: model.merge_lora("ab"[rank]),
    }
    found |= {what: error_of(call) for what, call in calls.items()}
    found["serving"] = model(**inputs).numpy().tobytes() == before and model.version == 2
    return found


if __name__ == "__main__":
    run_as_rank(main)
