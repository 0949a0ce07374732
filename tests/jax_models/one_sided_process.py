"""Run as a program, once for each of two processes of a mesh: what one of them does wrong, or otherwise, alone."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import Mock, patch

import jax
import numpy as np
from jax.sharding import Mesh
from several import answer, asked, error_of

import jax_models
from jax_models import coordination
from jax_models.processes import to_host, together
from parity.zoo.adapters import make_adapter
from parity.zoo.pictures import pictures


def main(job: dict[str, Any], process: int) -> dict[str, Any]:
    devices = np.array(jax.devices())
    mesh = Mesh(devices, ("tensor",))
    first, second, adapter = job["checkpoints"][0], job["checkpoints"][1], job["adapters"][0]
    inputs = {name: np.asarray(value) for name, value in job["inputs"].items()}
    found: dict[str, Any] = {}
    axis = "columns" if process else "tensor"
    found["axis"] = error_of(lambda: jax_models.load(first, mesh=Mesh(devices, (axis,))))
    axes = Mesh(devices.reshape(2, 2), ("expert", "fsdp")) if process else mesh
    found["other axes"] = error_of(lambda: jax_models.load(first, mesh=axes))
    for what, other in (("devices in another order", devices[::-1]), ("other devices", devices[1:])):
        theirs = Mesh(other if process else devices, ("tensor",))
        found[what] = error_of(lambda theirs=theirs: jax_models.load(first, mesh=theirs))
    own = Mesh(devices[:2], ("tensor",))
    found["elsewhere"] = error_of(lambda: jax_models.load(first, mesh=own)) if process else ""
    found["other config"] = error_of(lambda: jax_models.load(job["other"] if process else first, mesh=mesh))
    found["other dtype"] = error_of(lambda: jax_models.load(first, "bfloat16" if process else None, mesh))
    for what, option in job["options"].items():
        found[what] = error_of(lambda option=option: jax_models.load(first, mesh=mesh, **option[process]))
    model = jax_models.load(first, mesh=mesh)
    adapted = model.attach_lora(adapter, "a")
    before = to_host(adapted(**inputs)).tobytes()
    embed = to_host(model.get_embed_and_head()[0])
    turned = embed[::-1].copy()
    model = model.set_embed_and_head(embed.copy())  # what is compiled for this is there when one of them fails
    weights = jax.tree.map(lambda leaf: leaf, model.weights)
    if process:
        weights["model"]["norm"]["weight"] = weights["model"]["norm"]["weight"][:-1]
    drafting = jax_models.load(job["drafting"], mesh=mesh, mtp=True)
    drafting = drafting.attach_lora(make_adapter(job["drafting"], f"{job['directory']}/of {process}"), "a")
    ids, rows = inputs["input_ids"] % drafting.config.vocab_size, ["a", (None, "a")[process]]
    given = {"draft": drafting.draft, "max_new_tokens": 4}
    tap = {f"model.layers.{process}": np.zeros((*ids.shape, model.config.hidden_size), np.float32)}
    _, cache = model.prefill(**inputs)
    begun = [model.prefill(rows)[1] for rows in (inputs["input_ids"], inputs["input_ids"][::-1])]
    gone_on = [model.decode(token, model.prefill(**inputs)[1])[1] for token in (np.array([3, 5]), np.array([5, 3]))]
    work = job["directory"]
    seeing = jax_models.load(job["seeing"], mesh=mesh)
    shown = pictures(seeing.config)
    pixels, grid = shown["pixel_values"], shown["image_grid_thw"]
    last = jax_models.load(first, mesh=mesh, stage=(1, 2))
    begin = jax_models.load(first, mesh=mesh, stage=(0, 2))
    handed = [begin(rows) for rows in (inputs["input_ids"], inputs["input_ids"][::-1])]  # whole on each process
    hidden = np.ones((*ids.shape, model.config.hidden_size), np.float32)
    swapped = model.set_embed_and_head(turned)
    for name, one in (("a", model), ("b", swapped)):
        one.save(f"{work}/save {name}")
    loaded = [jax_models.load(path, mesh=mesh) for path in (first, second)]  # of one version
    restored = [jax_models.restore(path, mesh) for path in job["saves"]]  # that one process made, of one version
    both = model.attach_lora(job["adapters"][0], "a").attach_lora(job["adapters"][1], "b")
    renamed = [both.attach_lora(job["adapters"][0], name) for name in "ab"]
    replaced = [model.replace(weights=one.weights) for one in (model, swapped)]
    turned_over = [model.set_embed_and_head(jax.numpy.flip(model.get_embed_and_head()[0], axis)) for axis in (0, 1)]
    redrafting = drafting.update_weights_from_disk(job["drafting"])
    mine = swapped if process else model  # who forgot to go on with what an update gave
    many = np.full((1000, 2), 101, np.int32)
    _, wide = model.prefill(many, max_new_tokens=4)
    last_row = np.where(np.arange(len(many)) == len(many) - 1, 101 + process, 101)
    calls = {
        "other weights": lambda: model.update_weights_from_disk(second if process else first),
        "a short embedding": lambda: model.set_embed_and_head(turned[:-1] if process else turned),
        "another embedding": lambda: model.set_embed_and_head(turned if process else embed),
        "a name that is no UTF-8": lambda: model.attach_lora("/gr\udcfc" if process else adapter, "a"),
        "no adapter": lambda: model.attach_lora(job["other"] if process else adapter, "a"),
        "another adapter": lambda: model.attach_lora(job["adapters"][process], "a"),
        "another name": lambda: model.attach_lora(adapter, "ab"[process]),
        "detach": lambda: adapted.detach_lora("ab"[process]),
        "merge": lambda: adapted.merge_lora("ab"[process]),
        "replace": lambda: model.replace(weights=weights),
        "an option": lambda: model.generate(**inputs, max_new_tokens=-process),
        "a seed": lambda: model.generate(**inputs, temperature=1.0, seed=process),
        "a token": lambda: model(**inputs | {"input_ids": inputs["input_ids"] + 10_000 * process}),
        "other room": lambda: model.prefill(**inputs, max_new_tokens=4 + 400 * process),
        "other rows": lambda: adapted.prefill(**inputs, adapter=["a", (None, "a")[process]]),
        "another prompt": lambda: model.prefill(inputs["input_ids"][:, : 8 + process]),
        "no graphs": lambda: model.generate(**inputs, graphs=bool(process)),
        "an end": lambda: model.generate(**inputs, ignore_eos=bool(process)),
        "rows of a call": lambda: adapted(**inputs, adapter=rows),
        "a level": lambda: model.with_taps(**inputs, level=("layers", "modules")[process]),
        "what goes in": lambda: model.with_taps(**inputs, inject=tap),
        "other values": lambda: model.with_taps(**inputs, inject={"model.layers.0": hidden * process}),
        "other hidden states": lambda: last(hidden_states=hidden + process),
        "other shared states": lambda: last(hidden_states=handed[process]),
        "other pixels": lambda: seeing.get_image_features(pixels + process, grid),
        "fewer pixels": lambda: seeing.get_image_features(pixels[process:], grid),
        "other models": lambda: mine(**inputs),
        "other checkpoints": lambda: loaded[process](**inputs),
        "other names of adapters": lambda: renamed[process](**inputs, adapter="b"),
        "other weights by hand": lambda: replaced[process](**inputs),
        "other shared halves": lambda: turned_over[process](**inputs),
        "a draft of others": lambda: [drafting.draft, redrafting.draft.bind(drafting)][process](ids),
        "other models updated": lambda: mine.update_weights_from_disk(second),
        "other models swapped": lambda: mine.set_embed_and_head(turned),
        "other models replaced": lambda: mine.replace(weights=swapped.weights),
        "another function": lambda: mine.digests() if process else model.export(f"{work}/export"),
        "other saves": lambda: restored[process](**inputs),
        "restored to other axes": lambda: jax_models.restore(job["saves"][0], axes),
        "other models in steps": lambda: mine.prefill(**inputs),
        "other models saved": lambda: mine.save(f"{work}/save d"),
        "other models exported": lambda: mine.export(f"{work}/export"),
        "other models read": lambda: mine.digests(),
        "the last of many tokens": lambda: model.decode(last_row, wide),
        "another token": lambda: model.decode(inputs["input_ids"][:, process], cache),
        "another cache": lambda: model.decode(np.array([3, 5]), begun[process]),
        "another history": lambda: model.decode(np.array([3, 5]), gone_on[process]),
        "a draft": lambda: drafting.generate(ids, **given if process else {}),
        "another save": lambda: jax_models.restore(f"{work}/save {'ab'[process]}", mesh),
        "no save": lambda: jax_models.restore(f"{work}/{'nothing' if process else 'save a'}", mesh),
        "whether it is verified": lambda: jax_models.restore(f"{work}/save a", mesh, verify=bool(process)),
        "restored to an axis": lambda: jax_models.restore(f"{work}/save a", Mesh(devices, (axis,))),
        "saved nowhere": lambda: model.save(process or f"{work}/save c"),
        "what is given up": lambda: model.update_weights_from_disk(first, donate=bool(process)),
        "rows of a draft": lambda: drafting.generate(ids, adapter=rows, **given),
        "what a draft says": lambda: drafting.mtp_forward(ids, adapter=rows),
    }
    found |= {what: error_of(call) for what, call in calls.items()}
    found |= gone(mesh, process)
    odd = np.where(np.arange(len(embed))[:, None] == len(embed) - 1, np.float32(np.nan), embed)
    found["not a number"] = error_of(lambda: model.set_embed_and_head(odd))
    unsure = model.set_embed_and_head(head=odd)
    found["no tokens"] = error_of(lambda: unsure.generate(**inputs, max_new_tokens=2))
    found["handed on"] = handed_on(first, inputs, to_host(model.update_weights_from_disk(first)(**inputs)))
    found["serving"] = to_host(adapted(**inputs)).tobytes() == before
    tied = jax_models.load(job["tied"], mesh=mesh)
    table = to_host(tied.get_embed_and_head()[0])[::-1].copy()
    swapped = tied.set_embed_and_head(table, table.copy())
    (array, _) = swapped.get_embed_and_head()
    found["tied"] = to_host(array).tobytes() == table.tobytes()
    found["tied arrays"] = tied.set_embed_and_head(table, array).digests() == swapped.digests()
    found["untied"] = error_of(lambda: swapped.set_embed_and_head(None, table[::-1].copy()))
    return found


def gone(mesh: Mesh, process: int) -> dict[str, str]:
    """What both are told where one is interrupted, or comes when the other one waits no more."""
    interrupt = Mock(side_effect=KeyboardInterrupt)
    try:
        interrupted = error_of(lambda: together(mesh, interrupt if process else lambda: None))
    except KeyboardInterrupt:
        interrupted = "interrupted"
    with patch.object(coordination, "WAIT_S", 1.0):
        late = error_of(lambda: together(mesh, lambda: time.sleep(3 * process)))
    return {"interrupted": interrupted, "late": late}


def handed_on(path: str, inputs: dict[str, np.ndarray], expected: np.ndarray) -> list[float]:
    """How far stages are off that lie on one device of each process; and values of one that go into the other."""
    by_process = np.array(jax.devices()).reshape(2, -1)
    meshes = [Mesh(by_process[:, index], ("tensor",)) for index in range(2)]
    stages = [jax_models.load(path, mesh=mesh, stage=(index, 2)) for index, mesh in enumerate(meshes)]
    hidden, mask = stages[0](**inputs), {"attention_mask": inputs["attention_mask"]}
    plain = stages[1](**mask, hidden_states=np.zeros(hidden.shape, np.float32))
    into, _ = stages[1].with_taps(
        **mask, hidden_states=np.zeros(hidden.shape, np.float32), inject={"model.layers.1": hidden}
    )
    injected, _ = stages[1].with_taps(
        **mask, hidden_states=np.zeros(hidden.shape, np.float32), inject={"model.layers.1": to_host(hidden)}
    )
    assert not np.array_equal(to_host(plain), to_host(into))
    real = inputs["attention_mask"].astype(bool)
    pairs = (to_host(stages[1](**mask, hidden_states=hidden)), expected), (to_host(into), to_host(injected))
    return [float(np.abs(found - wanted)[real].max()) for found, wanted in pairs]


if __name__ == "__main__":
    job_, process_ = asked()
    jax.distributed.initialize(f"127.0.0.1:{job_['port']}", num_processes=2, process_id=process_)
    answer(job_, process_, main(job_, process_))
    jax.distributed.shutdown()
