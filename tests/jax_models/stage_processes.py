"""Run as a program, once for each of three processes: two stages of a pipeline, one of the first and one of the others.

With ``"killed"`` in its job the process of that number dies during the second save of the second stage: once it has
done, of its arrays, what ``"after"`` names.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from several import answer, asked, error_of

import jax_models
from jax_models import coordination

OWNERS = ((0,), (1, 2))  # processes of each stage


def failing(save: Any) -> dict[str, Any]:
    """What it raises, and how long that takes."""
    started = time.monotonic()
    return {"error": error_of(save), "seconds": time.monotonic() - started}


def on_a_full_disk(save: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def dying_after(step: str) -> None:
    handler, plain = ocp.PyTreeCheckpointHandler, getattr(ocp.PyTreeCheckpointHandler, step)

    def last(*args: Any, **kwargs: Any) -> None:
        plain(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(handler, step, last)


def main(job: dict[str, Any], process: int) -> dict[str, Any]:
    work = Path(job["directory"])
    stage = next(index for index, owners in enumerate(OWNERS) if process in owners)
    meshes = [
        Mesh(np.array([device for device in jax.devices() if device.process_index in owners]), ("tensor",))
        for owners in OWNERS
    ]
    mesh = meshes[stage]
    if process == 2:  # so that from here on it has saved more often than the other process of its stage
        jax_models.load(job["checkpoint"]).save(work / "alone")
    model = jax_models.load(job["checkpoint"], mesh=mesh, stage=(stage, len(OWNERS)))
    model.save(work / f"stage{stage}")
    if "killed" in job:
        if stage == 0:
            return {}
        if process == job["killed"]:
            dying_after(job["after"])
        return failing(lambda: model.save(work / "cut"))
    found: dict[str, Any] = {"digests": model.digests()}
    found["files"] = sorted(os.listdir(work / f"stage{stage}" / "weights"))
    restored = jax_models.restore(work / f"stage{stage}", mesh)
    found["restored"] = restored.digests() == found["digests"] and restored.stage == model.stage
    if stage == 1:
        (work / "file").touch()
        found["no directory"] = failing(lambda: model.save(work / "file" / "stage"))  # is made by the first process
        full = (lambda: on_a_full_disk(lambda: model.save(work / "full"))) if process == 2 else None
        found["full disk"] = failing(full or (lambda: model.save(work / "full")))
        found["apart"] = failing(lambda: model.save(work / f"apart{process}"))
        found["there"] = failing(lambda: model.save(work / ("stage1" if process == 1 else "new")))
        found["left"] = [name for name in ("full", "apart1", "apart2", "new") if (work / name).exists()]
        model.save(work / "full")
        found["saved at last"] = jax_models.restore(work / "full", mesh).digests() == found["digests"]
    multihost_utils.sync_global_devices("all stages are saved")
    if process == 0:
        found["elsewhere"] = jax_models.restore(work / "stage1", mesh).digests()
        found["not ours"] = error_of(lambda: jax_models.restore(work / "stage1", meshes[1]))
    return found


if __name__ == "__main__":
    job_, process_ = asked()
    soon: Any = {"heartbeat_timeout_seconds": 20} if "killed" in job_ else {}  # then jax ends the others
    coordination.STILL_S = 5.0
    jax.distributed.initialize(f"127.0.0.1:{job_['port']}", num_processes=3, process_id=process_, **soon)
    answer(job_, process_, main(job_, process_))
    jax.distributed.shutdown()
