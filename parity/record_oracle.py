"""What the float64 oracle says about a batch: the reference, how it amplifies rounding, and what faults would do."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from loaders import Checkpoint
from loaders.adapters.opening import open_adapter
from loaders.adapters.updates import Adapter
from loaders.reading.plan import plan_load
from loaders.stage import Stage
from parity.backend import BackendInfo, record_backend
from parity.comparison.probes import places, probe
from parity.oracle import oracle_forward
from parity.oracles.fault import Fault
from parity.oracles.inputs import replayable
from parity.oracles.taps import Taps
from parity.trace import Trace
from parity.trace_layout import AMPLIFICATION, ANGLE_ERROR, activations, hidden_layers

SHAKE = 2.0**-24  # small enough that twice of it moves everything twice as far
ANGLE_ROUNDING = 2.0**-24  # of the frequency and of its product with the position, in float32
# How hard to shake for a token's amplification. One direction may happen to leave a token where it is that another
# moves 200 times as far; and what nearly cancels may turn over under bfloat16's roundings, yet not under smaller ones.
SHAKES = (SHAKE, 2.0**-9, 2.0**-9, 2.0**-9)


@dataclass(frozen=True)
class OracleBackend:
    """The float64 oracle of a checkpoint as a ``parity.Backend``.

    Attributes:
        checkpoint: whose stored weights to compute with.
        like: a trace whose expert choices are replayed, so that a flip between near-equal experts is not an error.
        mtp: also run the checkpoint's draft.
        adapter: directory of one, for every row.
    """

    checkpoint: Checkpoint
    like: Trace | None = None
    mtp: bool = False
    adapter: str | os.PathLike[str] | None = None

    @property
    def info(self) -> BackendInfo:
        computed = {"adapter": None if self.opened is None else self.opened.digest}
        return BackendInfo(name="oracle64", dtype="float64", precision=computed, checkpoint=str(self.checkpoint.source))

    @functools.cached_property
    def opened(self) -> Adapter | None:
        """The adapter; None: there is none."""
        return None if self.adapter is None else open_adapter(self.adapter, self.checkpoint.config)

    def run(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The reference, and how much it amplifies rounding."""
        replayed = ("routing.", "mtp.routing.") if self.mtp else ("routing.",)
        chosen = {} if self.like is None else self.like.tensors
        routing = {name: array for name, array in chosen.items() if name.startswith(replayed)}
        if routing and self.like is not None:
            routing = replayable(self.checkpoint.config, routing, self.like.mask, mtp=self.mtp)
        common = {"mtp": self.mtp, "adapter": self.opened}
        tensors = oracle_forward(self.checkpoint, **inputs, routing=routing or None, **common)
        return tensors | amplification(self.checkpoint, inputs, tensors, **common)

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """The files' tensors that a model loads."""
        return self.checkpoint.stream(names=plan_load(self.checkpoint, Stage(mtp=self.mtp)).tensors)


def record_oracle(
    checkpoint: Checkpoint,
    inputs: Mapping[str, Any],
    *,
    like: Trace | None = None,
    mtp: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    probes: int | None = None,
) -> Trace:
    """What the oracle says about ``inputs``; see ``OracleBackend``.

    ``probes``: at how many places to try faults of one percent, two passes each; see ``comparison.probes.places``.
    """
    backend = OracleBackend(checkpoint, like, mtp, adapter)
    trace = record_backend(backend, inputs)
    # with the oracle's own experts replayed: a flip is no measure of an error
    routing = {name: array for name, array in trace.tensors.items() if name.startswith("routing.")}

    common: dict[str, Any] = {"routing": routing or None, "adapter": backend.opened}
    path = f"{checkpoint.config.text_paths[0]}.layers."
    after = {
        f"{path}{layer - 1}": trace.tensors[f"hidden_states.{layer}"] for layer in hidden_layers(trace.tensors) if layer
    }

    def forward(fault: Fault) -> dict[str, np.ndarray]:
        """The layers before the fault are as they were: they need not run again."""
        inside = fault.module.partition(".layers.")[2]
        is_first = fault.module.endswith(".embed_tokens")
        layer = int(inside.partition(".")[0]) if inside else 0 if is_first else len(after)
        taps = Taps({f"{path}{i}": after[f"{path}{i}"] for i in range(layer)}, f"{path}{layer}")
        faulty = oracle_forward(checkpoint, **inputs, **common, taps=taps, fault=fault)
        return trace.tensors | faulty

    exact = [trace.tensors[name] for name in activations(trace.tensors)]
    is_finite = all(np.isfinite(array).all() for array in exact)  # else it judges nobody, whatever a fault would do
    tried = places(checkpoint, probes if is_finite else 0)
    responses, documents = probe(tried, forward, trace.tensors, trace.mask)
    return Trace(trace.tensors | responses, trace.meta | {"probes": documents})


def amplification(
    checkpoint: Checkpoint,
    inputs: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    *,
    mtp: bool = False,
    adapter: Adapter | None = None,
) -> dict[str, np.ndarray]:
    """How much larger a relative error of every layer has become in each tensor, by token: ``amplification.NAME``.

    Where a norm follows what nearly cancels, as the first tokens of a gated delta net can, rounding alone decides; the
    ruler has to know. Measured by shaking the oracle, with its own experts replayed: the root of the mean square over
    ``SHAKES``. And ``angle_error.NAME``: how far off each tensor is when angles are float32's, as they are in every
    backend: at position 10**5 that is 2**-7 of a radian, whatever else is computed in. Float32 [B, T].
    """
    routing = {name: x for name, x in tensors.items() if name.startswith(("routing.", "mtp.routing."))}
    common = {"routing": routing or None, "mtp": mtp, "adapter": adapter}
    names = activations(tensors)
    moved_sq = dict.fromkeys(names, 0.0)
    for draw, shake in enumerate(SHAKES):
        shaken = oracle_forward(checkpoint, **inputs, **common, shake=shake, draw=draw)
        for name in names:
            moved_sq[name] += np.square((shaken[name] - tensors[name]) / shake).sum(axis=-1) / len(SHAKES)
    turned = oracle_forward(checkpoint, **inputs, **common, shake_angles=ANGLE_ROUNDING)
    found: dict[str, np.ndarray] = {}
    for name in names:
        size = np.maximum(np.linalg.norm(tensors[name], axis=-1), 1e-30)
        turned_by = np.linalg.norm(turned[name] - tensors[name], axis=-1)
        # beside a token of nearly nothing both are beyond float32; one that is none is for whoever compares to find
        for kind, moved in ((ANGLE_ERROR, turned_by), (AMPLIFICATION, np.sqrt(moved_sq[name]))):
            found[kind + name] = np.nan_to_num(moved / size, nan=np.inf).clip(max=1e6).astype(np.float32)
    return found
