"""Traces made of numbers instead of models: an oracle, and backends that differ from it by rounding-sized noise.

The noise grows as measured in bf16 blocks: 1.85 u sqrt(layer), independent by token and backend.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from parity.ruler import LIMITS
from parity.trace import Trace, input_hash, make_meta
from parity.trace_layout import hidden_layers, layer_of

B, T, D, V, L, E, X = 3, 20, 32, 50, 4, 8, 2
WEIGHTS = {"digests": {"model.norm.weight": "aa", "lm_head.weight": "bb"}, "root": "cafe" * 16}


def make_oracle(
    *, dtype: str = "float64", shape: tuple[int, int] = (B, T), layers: int = L, sparse: tuple = (), vocab: int = V
) -> Trace:
    rng = np.random.default_rng(0)
    stream = rng.standard_normal((*shape, D))
    tensors = {"hidden_states.0": stream}
    for i in range(1, layers + 1):
        stream = stream + 0.7 * rng.standard_normal(stream.shape)
        tensors[f"hidden_states.{i}"] = stream
    tensors["final_hidden_state"] = stream / np.sqrt((stream**2).mean(-1, keepdims=True))
    tensors["logits"] = 3 * rng.standard_normal((*shape, vocab))
    tensors["input_ids"] = rng.integers(0, V, shape)
    tensors["attention_mask"] = np.ones(shape, np.int64)
    for i in sparse:
        tensors[f"routing.{i}"] = np.argsort(rng.random((*shape, E)), axis=-1)[..., :X].astype(np.int32)
    digest = input_hash(tensors["input_ids"], tensors["attention_mask"])
    return Trace(tensors, make_meta(backend="oracle", dtype=dtype, input_hash=digest, weights=WEIGHTS))


def make_backend(oracle: Trace, backend: str, seed: int, *, dtype: str = "bfloat16", scale: float = 1.0) -> Trace:
    """A copy of the oracle with rounding-sized noise; ``scale`` times the usual."""
    rng = np.random.default_rng(seed)
    u, layers = LIMITS[dtype].u, max(hidden_layers(oracle.tensors))
    tensors = dict(oracle.tensors)
    for name, array in oracle.tensors.items():
        if array.dtype.kind == "f":
            layer = int(name.removeprefix("hidden_states.")) if name.startswith("hidden_states.") else layers
            size = scale * 1.85 * u * np.sqrt(layer) * np.sqrt((array**2).mean(-1, keepdims=True))
            tensors[name] = (array + size * rng.standard_normal(array.shape)).astype(np.float32)
    meta = {**oracle.meta, "backend": backend, "dtype": dtype, "precision": {"matmul": "highest"}}
    return Trace(tensors, meta)


def trio(dtype: str = "bfloat16", **shape: object) -> tuple[Trace, Trace, Trace]:
    """(ours, peer, oracle) that agree."""
    oracle = make_oracle(**shape)
    return make_backend(oracle, "jax", 1, dtype=dtype), make_backend(oracle, "torch", 2, dtype=dtype), oracle


def add_error(trace: Trace, oracle: Trace, *, from_layer: int, times: float) -> None:
    """Multiply the error of everything from one decoder layer on, as a bug there would."""
    for name in trace.tensors:
        layer = layer_of(name)
        if layer is None:
            layer = from_layer  # what follows the layers inherits from them
        if trace.tensors[name].dtype == np.float32 and layer >= from_layer:
            reference = oracle.tensors[name]
            trace.tensors[name] = (reference + times * (trace.tensors[name] - reference)).astype(np.float32)


def mask_out(traces: Iterable[Trace], row: int, positions: slice) -> None:
    """Call positions of a row padding, in all of them."""
    for trace in traces:
        trace.tensors["attention_mask"] = trace.tensors["attention_mask"].copy()
        trace.tensors["attention_mask"][row, positions] = 0
