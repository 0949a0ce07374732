"""What one comparison is about: two traces, the oracle of each, and the positions that count. And per-token sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from parity import trace_layout
from parity.ruler import LIMITS, Limits
from parity.trace import Trace

CHUNK = 1 << 22  # elements widened to float64 at a time: logits of a real vocabulary do not fit twice


@dataclass(frozen=True)
class Case:
    """Traces that were found comparable.

    Attributes:
        a: ours. b: the peer.
        oracle_a: the reference of a, None without an oracle; oracle_b: of b, often the same object.
    """

    a: Trace
    b: Trace
    oracle_a: Trace | None
    oracle_b: Trace | None

    @cached_property
    def limits(self) -> Limits:
        return LIMITS[self.a.meta["dtype"]]

    @cached_property
    def num_layers(self) -> int:
        """L, from what was recorded: the last hidden state or sparse layer that two of the traces have, at least 1.

        Where no two have one in common, the last that any has: one trace may hold logits alone.
        """
        traces = [trace for trace in (self.a, self.b, self.oracle_a) if trace is not None]
        found = [{*trace_layout.hidden_layers(t.tensors), *trace_layout.routing_layers(t.tensors)} for t in traces]
        having = Counter(chain.from_iterable(found))
        shared = [layer for layer, count in having.items() if count > 1]
        return max([1, *(shared or having)])

    @cached_property
    def names(self) -> list[str]:
        """Tensors that both traces have, in the order a model computes them."""
        return trace_layout.activations(self.a.tensors.keys() & self.b.tensors.keys())

    @cached_property
    def labels(self) -> tuple[str, str]:
        """What to call a and b: their backends, told apart where both are the same."""
        a, b = self.a.backend, self.b.backend
        return (a, b) if a != b else (f"{a} (a)", f"{b} (b)")

    @cached_property
    def modules(self) -> frozenset[str]:
        """Names of weights and modules that the traces mention: what there is to know of the architecture."""
        traces = [trace for trace in (self.a, self.b, self.oracle_a) if trace is not None]
        digests = [name for trace in traces for name in (trace.meta.get("weights") or {}).get("digests", {})]
        probes = [str(probe["module"]) for trace in traces for probe in trace.meta.get("probes") or []]
        return frozenset((*digests, *probes))

    @cached_property
    def text_path(self) -> str:
        """Of the text model, in the checkpoint's words."""
        return trace_layout.text_path(sorted(self.modules))

    def module_of(self, name: str) -> str:
        """The module whose result a tensor is."""
        return trace_layout.module_of(name, self.text_path)

    def has_oracle(self, name: str) -> bool:
        return all(oracle is not None and name in oracle.tensors for oracle in (self.oracle_a, self.oracle_b))

    def amplification(self, name: str) -> np.ndarray:
        """How much the oracle amplifies rounding at each unpadded token of a tensor, float64 [n]; 0 where unknown."""
        of_angles = self.limits.amplification_of(self._worst(trace_layout.ANGLE_ERROR + name, self.mask(name)))
        return np.maximum(self._worst(trace_layout.AMPLIFICATION + name, self.mask(name)), of_angles)

    def _worst(self, name: str, mask: np.ndarray) -> np.ndarray:
        """The larger of what the oracles say of each unpadded token, float64 [n]; 0 where none says anything."""
        oracles = [oracle for oracle in (self.oracle_a, self.oracle_b) if oracle is not None]
        found = [oracle.tensors[name][mask].astype(np.float64) for oracle in oracles if name in oracle.tensors]
        return np.max(found, axis=0) if found else np.zeros(mask.sum())

    def mask(self, name: str = "logits") -> np.ndarray:
        """Booleans [B, T] or, for the draft's tensors, [B, T-1]: the positions of a tensor that carry a meaning."""
        return for_tensor(name, self.a.mask & self.b.mask)


def for_tensor(name: str, mask_BT: np.ndarray) -> np.ndarray:
    """A mask over positions, as it applies to one tensor: the draft's row t is made from the tokens t and t+1."""
    return mask_BT[:, :-1] & mask_BT[:, 1:] if name in trace_layout.MTP else mask_BT


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums of squares of one tensor by token, float64 [n] over the n unpadded tokens in row-major order.

    Attributes:
        diff: of a - b. size: of the larger of a and b.
        error_a, scale_a: of a - oracle_a and of oracle_a; error_b, scale_b likewise. None without an oracle.
        finite_a, finite_b: bool [n].
    """

    diff: np.ndarray
    size: np.ndarray
    finite_a: np.ndarray
    finite_b: np.ndarray
    error_a: np.ndarray | None = None
    scale_a: np.ndarray | None = None
    error_b: np.ndarray | None = None
    scale_b: np.ndarray | None = None


def chunks(case: Case, name: str, mask: np.ndarray) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """(which tokens, [a, b] or [a, b, oracle_a, oracle_b] in float64 [m, size]) over the tokens of a mask."""
    traces = [case.a, case.b]
    if case.has_oracle(name) and case.oracle_a and case.oracle_b:
        traces += [case.oracle_a, case.oracle_b]
    flats = [trace.tensors[name].reshape(mask.size, -1) for trace in traces]
    tokens = np.flatnonzero(mask)
    step = max(1, CHUNK // max(1, flats[0].shape[1]))
    for start in range(0, len(tokens), step):
        chosen = tokens[start : start + step]
        yield slice(start, start + len(chosen)), [flat[chosen].astype(np.float64) for flat in flats]


def sums(case: Case, name: str) -> Sums:
    """Every sum of squares that the errors of a tensor are made of, in one pass over it."""
    mask = case.mask(name)
    with_oracle = case.has_oracle(name)
    count = int(mask.sum())
    out = np.zeros((6 if with_oracle else 2, count))
    finite = np.ones((2, count), bool)
    with np.errstate(invalid="ignore", over="ignore"):  # inf - inf; reported by position from the finite flags
        for where, (a, b, *oracles) in chunks(case, name, mask):
            finite[:, where] = np.isfinite(a).all(axis=1), np.isfinite(b).all(axis=1)
            rows = [_square(a - b), np.maximum(_square(a), _square(b))]
            if oracles:
                r_a, r_b = oracles
                rows += [_square(a - r_a), _square(r_a), _square(b - r_b), _square(r_b)]
            out[:, where] = rows
    diff, size, *errors = out
    return Sums(diff, size, finite[0], finite[1], *errors)


def _square(x: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", x, x)
