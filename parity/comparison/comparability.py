"""Whether two traces may be compared at all: same input, same weights, same shapes, same arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from parity import trace_layout
from parity.comparison.case import for_tensor
from parity.ruler import LIMITS
from parity.trace import Trace

NAMES_LISTED = 10  # of a longer list; the rest is counted


def find_reasons(a: Trace, b: Trace, oracles: Mapping[str, Trace]) -> tuple[list[str], list[str]]:
    """Why a and b cannot be compared (all reasons; none when they can), and what a reader should know if they can.

    Each of ``oracles``, named as they are to be called, is held against the first trace as the second is.
    """
    reasons = _arithmetic(a, b)
    for label, other in {"the second trace": b, **oracles}.items():
        reasons += _same_input(a, other, label)
        reasons += _same_weights(a, other, label)
        reasons += _same_shapes(a, other, label)
    for label, oracle in oracles.items():
        reasons += _is_float64(oracle, label) + _same_adapter(a, oracle, label)
    notes = [note for label, trace in {"first": a, "second": b}.items() for note in _weights_notes(label, trace)]
    if not a.tensors.keys() & b.tensors.keys() & set(trace_layout.activations(a.tensors)):
        reasons.append("the traces have no logits and no hidden states in common.")
    if not reasons:
        mask = a.mask & b.mask
        if not mask.any():
            reasons.append("no position is unpadded: the attention mask is zero everywhere.")
        for label, oracle in oracles.items():
            reasons += _oracle_is_finite(oracle, label, mask)
    return reasons, notes + _missing_notes(a, b)


def _arithmetic(a: Trace, b: Trace) -> list[str]:
    """Dtype and precision flags; an oracle computes in float64 whatever it judges."""
    reasons = []
    dtypes = a.meta["dtype"], b.meta["dtype"]
    if dtypes[0] != dtypes[1]:
        reasons.append(f"dtype differs: {dtypes[0]} against {dtypes[1]}. Record both in one dtype.")
    elif dtypes[0] not in LIMITS:
        reasons.append(f"dtype {dtypes[0]!r} has no limits; they are known for {', '.join(sorted(LIMITS))}.")
    flags = precision(a), precision(b)
    for name in sorted(flags[0].keys() & flags[1].keys()):
        if flags[0][name] != flags[1][name]:
            reasons.append(f"precision flag {name!r} differs: {flags[0][name]!r} against {flags[1][name]!r}.")
    if any(trace.meta.get("weight_only") is False for trace in (a, b)):
        reasons.append(
            "inputs of layers, or keys and values, were rounded: a value that rounds to the next code is no bug, and"
            " moves what follows. A whole network cannot be judged so; record both with --weight-only."
        )
    return reasons


def precision(trace: Trace) -> dict[str, Any]:
    return trace.meta.get("precision") or {}


def _same_input(a: Trace, other: Trace, label: str) -> list[str]:
    hashes = a.meta.get("input_hash"), other.meta.get("input_hash")
    if hashes[0] and hashes[1]:
        if hashes[0] != hashes[1]:
            return [f"input hash differs from {label}: {hashes[0][:12]} against {hashes[1][:12]}. Feed both one file."]
    elif "input_ids" not in a.tensors or "input_ids" not in other.tensors:
        return [f"nothing says that {label} saw the same input: neither an input hash nor input_ids in both."]
    reasons = []
    for name in ("input_ids", "attention_mask"):
        given = [trace.mask if name == "attention_mask" else trace.tensors.get(name) for trace in (a, other)]
        if given[0] is None or given[1] is None or given[0].shape != given[1].shape:
            continue  # a difference in shape is told with the other shapes
        if not np.array_equal(given[0], given[1]):
            row, position = np.argwhere(given[0] != given[1])[0]
            reasons.append(f"{name} differs from {label}, first at row {row}, position {position}.")
    return reasons


def _same_shapes(a: Trace, other: Trace, label: str) -> list[str]:
    if a.shape != other.shape:
        return [f"[B, T] differs from {label}: {list(a.shape)} against {list(other.shape)}."]
    reasons = []
    routing = [f"routing.{i}" for i in trace_layout.routing_layers(a.tensors)]
    for name in (*trace_layout.activations(a.tensors), *routing):
        if name in other.tensors and a.tensors[name].shape != other.tensors[name].shape:
            shapes = f"{list(a.tensors[name].shape)} against {list(other.tensors[name].shape)}"
            number = trace_layout.routing_of(name)
            place = "" if number is None else f" (experts a token in model.layers.{number - 1})"
            reasons.append(f"shape of {name}{place} differs from {label}: {shapes}.")
    return reasons


def _same_weights(a: Trace, other: Trace, label: str) -> list[str]:
    weights = a.meta.get("weights"), other.meta.get("weights")
    if not weights[0] or not weights[1] or weights[0]["root"] == weights[1]["root"]:
        return []
    roots = f"weights root differs from {label}: {weights[0]['root'][:12]} against {weights[1]['root'][:12]}"
    digests = weights[0].get("digests") or {}, weights[1].get("digests") or {}
    if not digests[0] or not digests[1]:
        return [f"{roots}; without digests in both, which tensors differ is unknown."]
    both = sorted(digests[0].keys() & digests[1].keys())
    groups = {
        "differ": [name for name in both if digests[0][name] != digests[1][name]],
        "only in the first": sorted(digests[0].keys() - digests[1].keys()),
        f"only in {label}": sorted(digests[1].keys() - digests[0].keys()),
    }
    return [roots + "".join(f"; {what}: {listed(names)}" for what, names in groups.items() if names) + "."]


def listed(names: list[str]) -> str:
    """Up to ten names, and how many more there are."""
    rest = len(names) - NAMES_LISTED
    return ", ".join(names[:NAMES_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _weights_notes(label: str, trace: Trace) -> list[str]:
    if trace.meta.get("weights"):
        return []
    return [f"the {label} trace ({trace.backend}) has no weights block, so equal weights are assumed, not checked."]


def _missing_notes(a: Trace, b: Trace) -> list[str]:
    notes = []
    for label, one, other in (("first", a, b), ("second", b, a)):
        only = [name for name in trace_layout.activations(one.tensors) if name not in other.tensors]
        if only:
            notes.append(f"only the {label} trace has {listed(only)}: not compared.")
        if "generated_ids" in one.tensors and "generated_ids" not in other.tensors:
            notes.append(f"only the {label} trace has generated tokens: not compared.")
    if all("generated_ids" in trace.tensors for trace in (a, b)):
        notes += _generation_notes(a.meta, b.meta)
    return notes


def _generation_notes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What two traces were asked to generate otherwise, where both say it."""
    counts = [meta["max_new_tokens"] for meta in (a, b) if "max_new_tokens" in meta]
    if len(counts) < 2:
        return []
    if a.get("ignore_eos") != b.get("ignore_eos"):
        return ["only one trace goes on after an end of sequence: generated tokens are not compared."]
    if counts[0] != counts[1]:
        return [f"{counts[0]} against {counts[1]} tokens were to be generated: the first {min(counts)} are compared."]
    return []


def _is_float64(oracle: Trace, label: str) -> list[str]:
    """What rounds as the backends do is no reference: its own roundings would be their errors."""
    dtype = oracle.meta["dtype"]
    if dtype == "float64":
        return []
    return [
        f"{label} ({oracle.backend}) computed in {dtype}, expected float64: its own roundings would be taken for the"
        " truth. Record one with --backend oracle, or compare without one."
    ]


def _same_adapter(a: Trace, oracle: Trace, label: str) -> list[str]:
    """An oracle that ran with another adapter than what it is to judge, where both say which."""
    ours, its = precision(a), precision(oracle)
    if "adapter" not in ours or "adapter" not in its or ours["adapter"] == its["adapter"]:
        return []
    said = " and ".join((one or "none")[:12] for one in (ours["adapter"], its["adapter"]))
    return [f"adapter differs from {label}: {said}. Record all of them with one."]


def _oracle_is_finite(oracle: Trace, label: str, mask: np.ndarray) -> list[str]:
    reasons = []
    for name in trace_layout.activations(oracle.tensors):
        bad = ~np.isfinite(oracle.tensors[name]).all(axis=2) & for_tensor(name, mask)
        if bad.any():
            row, position = np.argwhere(bad)[0]
            reasons.append(f"{label} is not finite: {name} at row {row}, position {position}. It cannot judge anybody.")
    return reasons
