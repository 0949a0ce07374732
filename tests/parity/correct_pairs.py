"""Runs that are all correct: one checkpoint in JAX (compiled and not), torch and transformers, as traces."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from loaders import open_checkpoint
from parity.backend import record_backend
from parity.backends import Framework, open_backend
from parity.foreign.transformers import TransformersModel
from parity.record import record_model
from parity.record_oracle import record_oracle
from parity.trace import Trace
from parity.zoo import make_checkpoint, prompts

BACKENDS = ("jax", "jax eager", "torch", "transformers")


def traces_of(
    model: str, directory: Path, *, seed: int, dtype: str, backends: tuple[str, ...] = BACKENDS, **config: Any
) -> dict[str, tuple[Trace, Trace]]:
    """(trace, its oracle with its own experts replayed) by backend; faults are tried by the first oracle alone."""
    path = make_checkpoint(model, directory, seed=seed, dtype="BF16", **config)
    checkpoint = open_checkpoint(path)
    inputs = prompts(checkpoint.config, padding=("right", "left")[seed % 2], seed=seed)
    opened = {name: open_backend(name) for name in ("jax", "torch")}
    found: dict[str, tuple[Trace, Trace]] = {}
    for name in backends:
        if name == "transformers":
            trace = transformers_trace(path, inputs, dtype)
        else:
            backend: Framework = opened[name.removesuffix(" eager")]
            with jax.disable_jit() if name.endswith("eager") else contextlib.nullcontext():
                trace = record_model(backend.load(path, dtype=dtype), backend, inputs)
            trace.meta["backend"] = name
        oracle = record_oracle(checkpoint, inputs, like=trace, probes=0 if found else None)
        found[name] = trace, oracle
    return found


def transformers_trace(path: Path, inputs: dict[str, np.ndarray], dtype: str) -> Trace:
    """What transformers' own model computes; in float32 its weights are wider than the files', and not compared."""
    model = TransformersModel.load(path, dtype=dtype)
    return record_backend(replace(model, knows_weights=False), inputs)
