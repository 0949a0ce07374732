"""Detectors that run a quantised model: under the ruler, its rounding of inputs, its FP8 cache."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from loaders import open_checkpoint
from loaders.nvfp4 import quantize_activations
from parity.model_backend import trace_names
from parity.mutants import _hasty_compiler
from parity.mutants.bench import PEER, Bench, Subject, judge
from parity.mutants.nvfp4_bench import load_quantised
from parity.oracle import oracle_forward
from parity.trace import Trace, input_hash, make_meta

KEPT = 0.99  # of cached values; an ulp tips the rest


def nvfp4_forward(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """The whole prompt, weights only, in float32 under the three-way ruler."""
    return _forward(bench, subject, backend, "float32")


def nvfp4_forward_bf16(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Likewise in bfloat16."""
    return _forward(bench, subject, backend, "bfloat16")


def nvfp4_activations(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Codes and block scales of inputs that tie, saturate and vanish, bit for bit."""
    scale, x_UK = 2.0**-4, _awkward()
    codes, block = bench.once("activation codes", lambda: quantize_activations(x_UK, scale))
    if backend == "torch":
        import torch

        from torch_models.kernels import nvfp4_reference
        from torch_models.storage import host_view

        found = map(host_view, nvfp4_reference.activation_codes(torch.from_numpy(x_UK), torch.tensor(scale)))
    else:
        import jax

        from jax_models.kernels import activations

        # compiled as a model is, and not as anything before it was
        found = map(np.asarray, jax.jit(lambda x, s: activations.activation_codes(x, s))(x_UK, scale))
    pairs = zip(("block scales", "codes"), reversed(list(found)), (block, codes), strict=True)
    return [f"{what} of inputs differ" for what, mine, owed in pairs if mine.tobytes() != owed.tobytes()]


def nvfp4_cache(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Keys and values of the first layer as a prefill keeps them: rounded to FP8, each with its own scale."""
    checkpoint = open_checkpoint(bench.path(subject))
    plain = bench.once(("cache", subject, backend), lambda: _kept(bench, subject, backend, inputs=False))
    found = _kept(bench, subject, backend, inputs=True)
    for name, leaf in (("key", "k_proj.k_scale"), ("value", "v_proj.v_scale")):
        scale = checkpoint.read(f"model.layers.0.self_attn.{leaf}")
        owed = (np.clip(plain[name] / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)).astype(np.float32) * scale
        right = float((owed == found[name]).mean())
        if right < KEPT:
            return [f"{name}s: {right:.0%} are what {leaf} makes of them, {KEPT:.0%} must be"]
    return []


def _forward(bench: Bench, subject: Subject, backend: str, dtype: str) -> list[str]:
    peer = bench.once((dtype, subject), lambda: _trace(bench, subject, PEER, dtype))
    batch: dict[str, Any] = bench.batch(subject)

    def oracle() -> Trace:
        return _as_trace("oracle64", "float64", batch, oracle_forward(open_checkpoint(bench.path(subject)), **batch))

    return judge(_trace(bench, subject, backend, dtype), peer, bench.once((dtype, "oracle", subject), oracle))


def _trace(bench: Bench, subject: Subject, backend: str, dtype: str) -> Trace:
    model = load_quantised(bench, subject, backend, dtype)
    batch = bench.batch(subject)
    with _hasty_compiler():
        out, taps = model.with_taps(**batch)
    names = trace_names(model.checkpoint)
    tensors = {"logits": out} | {names[path]: value for path, value in taps.items() if path in names}
    wide = {name: _wide(tensor) for name, tensor in tensors.items()}
    return _as_trace(backend, dtype, batch, wide)


def _as_trace(backend: str, dtype: str, batch: dict[str, np.ndarray], tensors: dict[str, np.ndarray]) -> Trace:
    kept = {name: array for name, array in tensors.items() if not name.startswith("router_logits")} | batch
    return Trace(kept, make_meta(backend=backend, dtype=dtype, input_hash=input_hash(**batch)))


def _wide(tensor: Any) -> np.ndarray:
    if hasattr(tensor, "detach"):
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy().copy()
    array = np.asarray(tensor)
    return array.copy() if array.dtype.kind in "iub" else array.astype(np.float32)


def _kept(bench: Bench, subject: Subject, backend: str, *, inputs: bool) -> dict[str, np.ndarray]:
    model = load_quantised(bench, subject, backend, inputs=inputs)
    with _hasty_compiler():
        _, cache = model.prefill(**bench.short(subject))
    cache = getattr(cache, "arrays", cache)
    is_real_BS = np.asarray(cache.key_mask)  # a prompt may lie anywhere in it
    return {name: np.asarray(cache.layers["0"][name]).swapaxes(1, 2)[is_real_BS] for name in ("key", "value")}


def _awkward() -> np.ndarray:
    """Rows of 32 whose block scale is exact under a global scale of 1/16, so that quotients can tie."""
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], np.float32)
    row = np.concatenate([ties, -ties, 0 * ties, -0.0 * ties]) / 16
    rng = np.random.default_rng(0)
    random = rng.standard_normal((40, 32)) * np.exp(2 * rng.standard_normal((40, 1)))
    return np.concatenate([[row, 448 * row, 4e6 * row, 1e-9 * row, 1.7 * row], random]).astype(np.float32)
