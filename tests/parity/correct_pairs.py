"""Runs that are all correct: one checkpoint in JAX (compiled and not), torch and transformers, as traces."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from loaders import open_checkpoint
from parity.backends import Framework, open_backend
from parity.record import record_model
from parity.record_oracle import record_oracle
from parity.trace import Trace, input_hash, make_meta
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
    """What transformers' own model of a checkpoint computes, by hooks: its last hidden state is post-norm."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    model.eval()
    mask_BT = torch.from_numpy(inputs["attention_mask"])
    tensors: dict[str, np.ndarray] = {}

    def keep(name: str, index: int | None = None) -> Any:
        def hook(module: Any, given: Any, output: Any) -> None:
            value = output[0 if index is None else index] if isinstance(output, tuple) else output
            value = value.reshape(*mask_BT.shape, -1)
            tensors[name] = (value.int() if index is not None else value.float()).numpy()

        return hook

    with contextlib.ExitStack() as hooks, torch.no_grad():
        hooks.enter_context(model.model.embed_tokens.register_forward_hook(keep("hidden_states.0")))
        hooks.enter_context(model.model.norm.register_forward_hook(keep("final_hidden_state")))
        for number, layer in enumerate(model.model.layers, 1):
            hooks.enter_context(layer.register_forward_hook(keep(f"hidden_states.{number}")))
            if "Sparse" in type(layer.mlp).__name__:
                hooks.enter_context(layer.mlp.gate.register_forward_hook(keep(f"routing.{number}", 2)))
        positions = (mask_BT.cumsum(1) - 1).clamp(min=0)
        ids = torch.from_numpy(inputs["input_ids"])
        out = model(input_ids=ids, attention_mask=mask_BT, position_ids=positions, use_cache=False)
    tensors |= {"logits": out.logits.float().numpy(), **inputs}
    return Trace(tensors, make_meta(backend="transformers", dtype=dtype, input_hash=input_hash(**inputs)))
