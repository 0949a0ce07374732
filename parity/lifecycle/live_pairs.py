"""Two live models of one checkpoint, compared, changed and compared again: what a notebook starts from."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from loaders import Checkpoint
from parity.backend import Inputs, on_host, record_backend
from parity.backends import open_backend
from parity.compare import compare
from parity.comparison.outcome import Comparison
from parity.model_backend import ModelBackend, trace_names
from parity.record import default_inputs, load_model
from parity.record_oracle import record_oracle
from parity.reproduce import live_command
from parity.ruler import Side
from parity.trace import Trace
from parity.trace_layout import AFTER, activations, order_of, order_of_module, routing_layers


@dataclass(frozen=True)
class LivePair:
    """Two live models and the inputs both are run on.

    Attributes:
        a: ours. b: the peer.
        inputs: ``input_ids`` [B, T], optional ``attention_mask``, ``position_ids``, images and videos.
        adapter: directory of the adapter that both run with, which the oracle has to know.
    """

    a: ModelBackend
    b: ModelBackend
    inputs: Inputs
    adapter: str | None = None
    _oracles: dict[str, tuple[Checkpoint, Trace]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def checkpoint(self) -> Checkpoint:
        """What the oracle reads: whatever ``a`` was last loaded from."""
        return self.a.model.checkpoint

    def compare(self) -> Comparison:
        """Record both models as they stand now, and hold them against each other and the float64 oracle."""
        return self._judged(*(record_backend(side, self.inputs) for side in (self.a, self.b)))

    def replace(self, *, a: Any = None, b: Any = None) -> LivePair:
        """The pair with other models: what a change of a JAX model returns, for one."""
        models = {side: model for side, model in (("a", a), ("b", b)) if model is not None}
        return replace(self, **{side: replace(getattr(self, side), model=model) for side, model in models.items()})

    def inject(self, before: Comparison, path: str, *, into: Side | None = None) -> Comparison:
        """See ``Comparison.inject``; ``before`` was made by ``compare``."""
        if into is None:
            into = "a" if before.whose == "a" else "b"
        if into not in ("a", "b"):
            raise ValueError(f"into={into!r}, expected 'a' or 'b': the side that is run again.")
        if before.case is None:
            raise ValueError(f"the two could not be compared, so there is nothing to heal. {before.summary}")
        path = self.path_of(path)
        source, target = (self.a, self.b) if into == "b" else (self.b, self.a)
        known = trace_names(self.checkpoint).get(path)
        given = (before.case.a if into == "b" else before.case.b).tensors.get(known or "")
        if given is None:  # not of a trace: the source has to run again
            trace = rerun(source, target, self.inputs, path)
        else:
            trace = record_backend(replace(target, inject={path: given}), self.inputs)
        sides = (before.case.a, trace) if into == "b" else (trace, before.case.b)
        after = self._judged(_after(path, sides[0]), _after(path, sides[1]))
        done = f"{target.name} went on from {source.name}'s output of {path} in the place of its own"
        told = _told(before, after, path, giver="a" if into == "b" else "b", name=source.name, rest=self._rest(path))
        return replace(after, experiment=f"{done}; what follows is {told}")

    def path_of(self, given: str) -> str:
        """The module path of what a user calls ``layers.7``, or a tensor of the trace."""
        paths = {name: path for path, name in trace_names(self.checkpoint).items()}
        text = self.checkpoint.config.text_paths[0]
        is_short = given.partition(".")[0] in ("layers", "embed_tokens", "norm")
        return paths.get(given, f"{text}.{given}" if is_short else given)

    def __repr__(self) -> str:
        rows, tokens = np.shape(self.inputs["input_ids"])
        return f"{self.a.name} against {self.b.name}: {self.checkpoint.source}, {self.a.dtype}, {rows} rows of {tokens}"

    def _rest(self, path: str) -> str:
        """Where an error is that the value of ``path`` does not explain."""
        is_part = (
            re.search(r"\.layers\.\d+\..", path) or order_of_module(path) == 0 and not path.endswith(".embed_tokens")
        )
        joined_later = order_of_module(path) < AFTER and any(name.startswith("pixel_values") for name in self.inputs)
        if not is_part and not joined_later:
            return f"something after {path}"
        return f"something after {path} or beside it, where the residual stream passes it by,"

    def _judged(self, a: Trace, b: Trace) -> Comparison:
        if routing_layers(a.tensors):  # each against its own expert choices: a flip of near equals is no error
            oracle_a, oracle_b = (self._oracle(like=trace) for trace in (a, b))
        else:
            oracle_a = oracle_b = self._plain_oracle()
        found = compare(a, b, oracle_a, oracle_b=oracle_b)
        has_failed = found.verdict == "FAIL"
        command = live_command(found.divergence, has_adapter=self.adapter is not None) if has_failed else None
        return replace(found, pair=self, commands=(command,) if command else ())

    def _plain_oracle(self) -> Trace:
        kept = self._oracles.get("plain")
        if kept is None or kept[0] is not self.checkpoint:
            self._oracles["plain"] = kept = (self.checkpoint, self._oracle())
        return kept[1]

    def _oracle(self, like: Trace | None = None) -> Trace:
        return record_oracle(self.checkpoint, self.inputs, like=like, adapter=self.adapter)


def live_pair(
    uri: str | os.PathLike[str],
    a: str = "jax",
    b: str = "torch",
    *,
    inputs: Mapping[str, np.ndarray] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    weight_only: bool = False,
) -> LivePair:
    """Load a checkpoint into two backends, to be compared while it lives.

    Args:
        uri: the checkpoint.
        a: ours, ``jax`` or ``torch``.
        b: the peer, likewise.
        inputs: what both are run on; None: ``parity.record.default_inputs``, long enough for a rotary bug to show.
        dtype: compute dtype; None: the checkpoint's own.
        device: of both; None: cpu (torch), the first (jax).
        adapter: attach this PEFT adapter, for every row.
        weight_only: of a quantised checkpoint, round neither inputs of layers nor keys and values, so that the two can
            be held against each other.

    Raises:
        CheckpointError: the checkpoint cannot be loaded; lists everything.
        DeviceNotFound: a backend is not installed, or has no such device.
        ValueError: ``weight_only`` for a checkpoint that is not quantised.
    """
    sides = []
    labels = (a, b) if a != b else (f"{a} (a)", f"{b} (b)")
    for name, label in zip((a, b), labels, strict=True):
        backend = open_backend(name, device)
        model = load_model(uri, backend, dtype=dtype, weight_only=weight_only, adapter=adapter)
        sides.append(ModelBackend(model, backend, label))
    given = default_inputs(sides[0].model.checkpoint) if inputs is None else on_host(inputs)
    return LivePair(sides[0], sides[1], given, None if adapter is None else os.fspath(adapter))


def rerun(a: ModelBackend, b: ModelBackend, inputs: Inputs, path: str) -> Trace:
    """What ``b`` computes on ``inputs`` with ``a``'s value at ``path`` (``model.layers.7``) in the place of its own.

    Raises:
        ValueError: ``a`` or ``b`` has no such tap, or takes no such inputs.
    """
    try:
        found = a.taps(inputs, level="operations", within=path)
    except ValueError as error:
        raise ValueError(f"{a.name}: {error}") from error
    if path not in found:
        raise ValueError(f"{a.name} has no tap {path!r}. Taps with level='operations' name what there is.")
    return record_backend(replace(b, inject={path: found[path]}), inputs)


def _after(path: str, trace: Trace) -> Trace:
    """The trace without what is computed before ``path`` and at it, and a note of that for whoever judges it."""
    last = order_of_module(path)
    first = last if re.search(r"\.layers\.\d+\..", path) else last + 1  # a part of a layer leaves its result to judge
    names = {name for name in activations(trace.tensors) if order_of(name) < first}
    names |= {f"routing.{i}" for i in routing_layers(trace.tensors) if i < first}
    kept = {name: array for name, array in trace.tensors.items() if name not in names}
    return Trace(kept, trace.meta | {"after": path})


def _told(before: Comparison, after: Comparison, path: str, *, giver: Side, name: str, rest: str) -> str:
    """What the second comparison says about the first.

    ``giver``: the side whose value was taken, called ``name``. ``rest``: where that value is not heard.
    """
    if before.verdict != "FAIL":
        return "as it was: within its limits before, too"
    if after.verdict != "FAIL":
        return f"right, so what was wrong came from {path} or from before it"
    if before.whose == "both":
        return f"still wrong, as both were before, so nothing is known of what comes after {path}"
    if before.whose != giver:
        return f"still wrong, so {rest} is wrong by itself"
    if after.whose == giver:
        return f"wrong in {name} alone, as before, so its value was right and {rest} is wrong by itself"
    return f"wrong in both now, so what is wrong in {name} came from {path} or from before it"
