"""What parity needs of a model, ours or anybody's: it runs on inputs and says, by name, what it computed and holds.

Small on purpose: a torch module, a JAX function, a transformers model or a server behind HTTP fits behind it. Adapters
for the first three are in ``parity.foreign``; ours is ``ModelBackend``, the reference is ``OracleBackend``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from loaders.digest import digests, root_digest
from parity import trace_layout
from parity.trace import Trace, input_hash, make_meta

Inputs = Mapping[str, np.ndarray]
Weights = Iterable[tuple[str, np.ndarray]]
HEAD = "lm_head"  # what logits are called among taps, tied or not


@dataclass(frozen=True, kw_only=True)
class BackendInfo:
    """Facts about a backend that go into its traces.

    Attributes:
        name: what reports call it: ``jax``, ``torch``, ``transformers``.
        dtype: what it computes in: ``float32``, ``bfloat16``, ``float16``; ``float64`` of an oracle.
        device: as its framework calls it.
        versions: of packages that a result depends on.
        precision: flags in force; a key that two backends share must agree, see ``parity.trace.make_meta``.
        checkpoint: where its weights are from, so that a reader can repeat the run; empty where nobody knows.
        facts: other entries of the trace's document.
    """

    name: str
    dtype: str
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    precision: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Backend(Protocol):
    """A model that can be held against another.

    Attributes:
        info: read after a run, so it may depend on it.
    """

    @property
    def info(self) -> BackendInfo: ...

    def run(self, inputs: Inputs) -> Mapping[str, np.ndarray]:
        """What it computes on ``input_ids`` [B, T] and optional ``attention_mask``, ``position_ids``, images, videos.

        Returns tensors by trace name (``parity.trace_layout``): ``logits`` [B, T, V] and, where they can be had,
        ``hidden_states.0`` (embeddings), ``hidden_states.i`` (residual stream after decoder layer i, from 1, before the
        final norm), ``final_hidden_state``, float [B, T, D], and ``routing.i`` [B, T, X], integers.
        """
        ...

    def weights(self) -> Weights | None:
        """Its weights as (checkpoint tensor name, array in the stored dtype), or None where they cannot be had.

        With them, a comparison of two different checkpoints is refused. Without, equal weights are assumed, and said.
        """
        ...


class Tapped(Protocol):
    """What ``parity.bisect`` asks of a model, ours or any other."""

    @property
    def name(self) -> str:
        """What to call it."""
        ...

    @property
    def dtype(self) -> str:
        """What it computes in: ``float32`` or ``bfloat16``."""
        ...

    def taps(
        self,
        inputs: Inputs,
        *,
        level: str = "layers",
        within: str | None = None,
        inject: Inputs | None = None,
    ) -> dict[str, np.ndarray]:
        """What it computes, by path, in order of execution; see ``Model.with_taps``. Logits are ``lm_head``."""
        ...


def record_backend(backend: Backend, inputs: Inputs, *, weights_of: Trace | None = None) -> Trace:
    """Run a backend and write down what it computed.

    ``weights_of``: a trace of the same backend with the same weights, so that their digests are not computed again.

    Raises:
        ValueError: it returned something else than a trace has, or inputs are not a model's; lists everything wrong.
    """
    inputs = on_host(inputs)
    if "input_ids" not in inputs:
        raise ValueError(f"inputs are {sorted(inputs)}, expected input_ids [B, T] among them")
    if np.ndim(inputs["input_ids"]) != 2:
        raise ValueError(f"input_ids are {list(np.shape(inputs['input_ids']))}, expected [B, T]: a row for each prompt")
    tensors = {name: _host(array) for name, array in backend.run(inputs).items()} | given(inputs)
    info = backend.info
    weights = _digested(backend) if weights_of is None else weights_of.meta.get("weights")
    meta = make_meta(
        backend=info.name,
        dtype=info.dtype,
        input_hash=input_hash(**inputs),
        device=info.device,
        versions=dict(info.versions),
        precision=dict(info.precision),
        weights=weights,
        checkpoint=info.checkpoint,
    )
    meta |= info.facts
    if problems := trace_layout.find_problems(tensors, meta):
        raise ValueError(f"backend {info.name!r} did not give a trace: {' '.join(problems)}")
    return Trace(tensors, meta)


def on_host(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs without those that are None, and tensors of torch, on whatever device, as NumPy has them."""
    given = {name: array for name, array in inputs.items() if array is not None}
    for name, array in given.items():
        if hasattr(array, "detach"):
            host = array.detach().cpu()
            given[name] = (host.float() if str(host.dtype) == "torch.bfloat16" else host).numpy()
    return given


def _digested(backend: Backend) -> dict[str, Any] | None:
    """Digests of what it holds, as traces have them; None where it cannot be had."""
    held = backend.weights()
    if held is None:
        return None
    found = digests(held)
    return {"digests": found, "root": root_digest(found)}


def given(inputs: Inputs) -> dict[str, np.ndarray]:
    """What of the inputs a trace keeps: ``input_ids`` and ``attention_mask`` [B, T]; no mask means all real."""
    ids, mask = np.asarray(inputs["input_ids"]), inputs.get("attention_mask")
    return {"input_ids": ids, "attention_mask": np.ones(ids.shape, np.int64) if mask is None else counted(mask)}


def counted(mask: Any) -> np.ndarray:
    """A mask of 0 and 1 as integers, where it is of floats or bools; another as it is."""
    array = np.asarray(mask)
    return array.astype(np.int64) if array.dtype.kind in "fb" and np.isin(array, (0, 1)).all() else array


def _host(array: Any) -> np.ndarray:
    """Floats narrower than float32 widened, exactly; integers and wide floats as they are."""
    array = np.asarray(array)
    return array if array.dtype.kind in "iub" or array.dtype.itemsize >= 4 else array.astype(np.float32)
