"""Run as a program: save a model and be killed in the middle of it, without any farewell."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

import jax_models


def counted(save, kill_at: float = float("inf")) -> int:
    """Calls and returns of functions on this thread while saving; at one of them, the end."""
    count = 0

    def step(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += 1
        if count >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(step)
    try:
        save()
    finally:
        sys.setprofile(None)
    return count


def main(checkpoint: str, directory: str, fraction: float) -> None:
    model = jax_models.load(checkpoint, mesh=Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("expert", "tensor")))
    model.save(Path(directory) / "warm")  # the second takes the same course
    total = counted(lambda: model.save(Path(directory) / "complete"))
    print("complete", flush=True)
    counted(lambda: model.save(Path(directory) / "cut"), total * fraction)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
