"""What a failure looks like, in numbers that no model's size is in: where it begins, how it grows, whom it hits.

Two bugs of one kind, in models of other sizes and weights, look alike; ``parity.comparison.nearest`` compares.
Everything is relative: depths to the number of layers, positions to a row's length, errors to each other.
"""

from __future__ import annotations

import math

import numpy as np

from parity.comparison.case import Case, chunks
from parity.comparison.findings import Divergence, Routing, TensorRow, Top1
from parity.comparison.router_flips import Router

TINY = 1e-12
DECADES = 3.0  # looked at below the largest error; what is smaller is the same here
EDGES = (0.0, 1e-9, 0.04, 0.25, 0.5, 0.75, 1.0 + 1e-9)  # of positions in a row: the first, the next few, quarters


def profile(
    case: Case,
    rows: tuple[TensorRow, ...],
    divergence: Divergence | None,
    router: Router,
    top1: tuple[Top1, ...],
    routing: Routing | None,
) -> dict[str, float] | None:
    """Features by name, each about -1 to 1; None where there is no failure, or no oracle to say whose."""
    first = next((row for row in rows if row.verdict == "FAIL"), None)
    if first is None or first.basis != "oracle" or divergence is None or divergence.side is None:
        return None
    if first.nonfinite:
        return {"nonfinite": 1.0}
    side = divergence.side
    found = _by_depth(rows, side) | _begins(rows, first) | _by_token(case, first, side, router)
    picked = next((one for one in top1 if one.side == side), None)
    found["top1"] = picked.agree / picked.decidable if picked and picked.decidable else 1.0
    found["sparse"] = float(routing is not None)
    found["flips"] = min(1.0, 4.0 * routing.between / max(routing.layer_tokens, 1)) if routing else 0.0
    return {name: round(value, 3) for name, value in found.items()}


def _by_depth(rows: tuple[TensorRow, ...], side: str) -> dict[str, float]:
    """The error beyond the peer's, tensor by tensor, in decades below the largest."""
    excess: dict[str, float] = {}
    for row in rows:
        own, other = (row.e_a, row.e_b) if side == "a" else (row.e_b, row.e_a)
        if own is not None and other is not None:
            excess[row.name] = 2.0 if math.isinf(own) else math.sqrt(max(own**2 - other**2, 0.0))
    largest = max(excess.values(), default=0.0)
    layers = {layer: excess[row.name] for row in rows if (layer := row.layer) is not None and row.name in excess}
    last = max(layers, default=0)
    places = {"embeddings": layers.get(0), "layer first": layers.get(1), "layer last": layers.get(last)}
    places["layer middle"] = layers.get((last + 1) // 2)
    places |= {"final": excess.get("final_hidden_state"), "logits": excess.get("logits")}
    found = {name: _decades(value or 0.0, largest) / DECADES for name, value in places.items()}
    return found | {"largest": max(-6.0, math.log10(largest + TINY)) / 3}


def _begins(rows: tuple[TensorRow, ...], first: TensorRow) -> dict[str, float]:
    """Which tensor fails first."""
    last = max((row.layer for row in rows if row.layer is not None), default=1)
    after = {"final_hidden_state": 1.0, "logits": 2.0}.get(first.name, 0.0)
    depth = 1.0 if first.layer is None else first.layer / max(last, 1)
    return {"begins at embeddings": float(first.layer == 0), "begins after layers": after, "begins at depth": depth}


def _by_token(case: Case, first: TensorRow, side: str, router: Router) -> dict[str, float]:
    """Of the first tensor that fails: which tokens are off, in which direction, in how many channels."""
    keep = router.keep(case, first.name)
    errors, along, energy = [], [], np.zeros(case.a.tensors[first.name].shape[-1])
    for _, (a, b, oracle_a, oracle_b) in chunks(case, first.name, keep):
        own, oracle = (a, oracle_a) if side == "a" else (b, oracle_b)
        size = np.maximum(np.linalg.norm(oracle, axis=1), TINY)
        error = own - oracle
        length = np.linalg.norm(error, axis=1)
        errors.append(length / size)
        along.append(np.einsum("nd,nd->n", error, oracle) / (size * np.maximum(length, TINY)))
        energy += np.square(error / size[:, None]).sum(axis=0)
    e, cosine = np.log10(np.concatenate(errors) + TINY), np.concatenate(along)
    middle = float(np.median(e))
    found = {
        "tokens p10": _bent(float(np.quantile(e, 0.1)) - middle),
        "tokens p90": _bent(float(np.quantile(e, 0.9)) - middle),
        "tokens max": _bent(float(e.max()) - middle),
        "tokens touched": float((e > e.max() - 2).mean()),
        "along": float(np.mean(cosine)),
        "aligned": float(np.mean(np.abs(cosine))),
        "channels": float(energy.sum() ** 2 / max(np.square(energy).sum(), TINY) / energy.size),
    }
    return found | _by_position(case, keep, e - middle)


def _by_position(case: Case, keep: np.ndarray, e: np.ndarray) -> dict[str, float]:
    mask = case.mask()
    rows, positions = np.nonzero(keep)
    start, length = mask.argmax(axis=1), np.maximum(mask.sum(axis=1) - 1, 1)
    relative = (positions - start[rows]) / length[rows]
    bins = np.digitize(relative, EDGES[1:])
    found = {
        f"position {number}": _bent(float(np.median(e[bins == number]))) if (bins == number).any() else 0.0
        for number in range(len(EDGES) - 1)
    }
    by_row = [float(np.median(e[rows == row])) for row in np.unique(rows)]
    is_padded_left = [start[row] > 0 for row in np.unique(rows)]
    left = [value for value, padded in zip(by_row, is_padded_left, strict=True) if padded]
    rest = [value for value, padded in zip(by_row, is_padded_left, strict=True) if not padded]
    return found | {"left padding": _bent(float(np.mean(left) - np.mean(rest))) if left and rest else 0.0}


def _decades(value: float, largest: float) -> float:
    return max(-DECADES, math.log10((value + TINY) / (largest + TINY)))


def _bent(decades: float) -> float:
    """Decades, less and less of them: three are hardly more than two."""
    return math.tanh(decades / 1.5)
