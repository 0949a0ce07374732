"""Run as a program, once for each process of a mesh: all that happens to a weight, and what came of it as JSON."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from several import BytesRead, answer, asked, error_of

import jax_models
from jax_models.orbax_files import read_arrays
from jax_models.processes import to_host, together
from jax_models.weights import flatten
from loaders import CheckpointError, open_checkpoint
from loaders.reading.filling import Filling
from loaders.reading.plan import plan_load
from loaders.reading.whole import read_whole
from loaders.stage import Stage

# saved by one device: shape, and how the mesh cuts them
LARGE: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "stack": ((8, 2, 256, 2048), ("halves",)),
    "rows": ((2048, 4096), ("halves",)),
    "columns": ((2048, 4096), (None, "halves")),
}


def share_read(work: Any, checkpoint: str, read: BytesRead) -> tuple[Any, float]:
    """What ``work`` returns, and how much it read, as a share of the checkpoint's tensors; headers apart."""
    opened = open_checkpoint(checkpoint)
    headers = sum(file.stat().st_size for file in Path(checkpoint).iterdir()) - opened.num_bytes
    read.count = 0
    result = work()
    return result, max(0, read.count - headers) / opened.num_bytes


def is_the_checkpoints(model: Any, checkpoint: str) -> bool:
    """Whether every shard here is a slice of the checkpoint, bit for bit."""
    plan = plan_load(open_checkpoint(checkpoint), Stage())
    flat = flatten(model.weights)
    for spec, param in read_whole(Filling(plan)):
        for shard in flat[spec.name].addressable_shards:
            if np.asarray(shard.data).tobytes() != param[shard.index].tobytes():
                return False
    return True


def share_of_large(where: str, mesh: Mesh) -> dict[str, float]:
    """Of arrays that were saved alone how much this process has the system read for the half that is its own."""
    found = {}
    for name, (shape, cut) in LARGE.items():
        wanted = jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, PartitionSpec(*cut)))
        before = bytes_asked_for()
        (array,) = read_arrays(f"{where}/{name}", {name: wanted}).values()
        found[name] = (bytes_asked_for() - before) / array.nbytes
    return found


def bytes_asked_for() -> int:
    """Of the system by this process: TensorStore does not read through Python."""
    return int(Path("/proc/self/io").read_text().split()[1])


def reads_nothing(filling: Any, *_: Any) -> Any:
    raise CheckpointError(filling.plan.checkpoint.source, ["the disk is gone"])


def main(job: dict[str, Any], process: int) -> dict[str, Any]:
    devices = np.array(jax.devices())
    assert len(devices) == 2 * len(jax.local_devices())
    mesh = Mesh(devices.reshape(job["sizes"]), job["axes"])
    read = BytesRead()
    first, second = job["checkpoints"]
    work = Path(job["directory"])
    inputs = {name: np.asarray(value) for name, value in job["inputs"].items()}
    found: dict[str, Any] = {}
    model, found["share"] = share_read(lambda: jax_models.load(first, mesh=mesh, **job["options"]), first, read)
    budgeted = jax_models.load(first, mesh=mesh, host_budget_bytes=job["budget"], **job["options"])
    found["within half"] = budgeted.digests() == model.digests()
    found["loaded"] = is_the_checkpoints(model, first) if not job["options"] else None
    logits = to_host(model(**inputs))
    found["tokens"] = np.asarray(model.generate(**inputs, max_new_tokens=4, ignore_eos=True)).tolist()
    found["sampled"] = np.asarray(model.generate(**inputs, max_new_tokens=2, temperature=0.7, top_p=0.9)).tolist()
    changed, found["reloaded share"] = share_read(lambda: model.update_weights_from_disk(second), second, read)
    found["reloaded"] = is_the_checkpoints(changed, second) if not job["options"] else None
    changed_logits = to_host(changed(**inputs))
    found["digests"], found["changed digests"] = model.digests(), changed.digests()
    embed = to_host(model.get_embed_and_head()[0])
    swapped = changed.set_embed_and_head(embed[::-1].copy())
    found["swapped"] = to_host(swapped.get_embed_and_head()[0]).tobytes() == embed[::-1].tobytes()
    local = jax.device_put(embed[::-1].copy(), jax.local_devices()[0])  # as a model of one device has it
    found["swapped by an array"] = changed.set_embed_and_head(local).digests() == swapped.digests()
    if job["adapter"]:
        adapted = model.attach_lora(job["adapter"], "a")
        adapted_logits = to_host(adapted(**inputs))
        found["detached"] = to_host(adapted.detach_lora("a")(**inputs)).tobytes() == logits.tobytes()
    changed.export(work / "export")
    found["export again"] = error_of(lambda: changed.export(work / "export"))
    changed.save(work / "save")
    restored = jax_models.restore(work / "save", mesh)
    found["restored"] = restored.digests() == found["changed digests"]
    other = jax_models.restore(job["saved by one"], mesh)
    found["restored from one"] = other.digests() == found["digests"]
    halves = Mesh(devices.reshape(2, -1), ("halves", "rest"))
    found["large"] = share_of_large(job["large"], halves)
    found["bad on one"] = error_of(lambda: model.update_weights_from_disk(job["bad"] if process else second))
    found["failed on one"] = error_of(lambda: together(mesh, lambda: 1 / process))
    found["still serving"] = to_host(model(**inputs)).tobytes() == logits.tobytes()
    save = job["bad save"] if process else job["saved by one"]  # which says the same, and lacks the arrays
    found["bad save on one"] = error_of(lambda: jax_models.restore(save, mesh))
    found["lost save on one"] = error_of(lambda: jax_models.restore(work / "none" if process else work / "save", mesh))
    given = changed.update_weights_from_disk(first, donate=True)
    found["donated"] = given.digests() == found["digests"]
    reading = importlib.import_module("jax_models.reading")
    with patch.object(reading, "read_params", reads_nothing if process else reading.read_params):
        found["donated in vain"] = error_of(lambda: given.update_weights_from_disk(second, donate=True))
    found["in vain"] = error_of(lambda: given(**inputs))
    found["updated again"] = given.update_weights_from_disk(second).digests() == found["changed digests"]
    if process == 0:
        extra = {"adapted": adapted_logits} if job["adapter"] else {}
        np.savez(work / "logits.npz", logits=logits, changed=changed_logits, **extra)
    return found


if __name__ == "__main__":
    job_, process_ = asked()
    jax.distributed.initialize(f"127.0.0.1:{job_['port']}", num_processes=2, process_id=process_)
    answer(job_, process_, main(job_, process_))
    jax.distributed.shutdown()
