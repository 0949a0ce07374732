"""Faults of one percent, tried in the oracle: how far each would move every tensor of this checkpoint on these inputs.

A comparison holds what is stored here against its limits (``parity.comparison.sensitivity``), so that it knows what it
could not have seen. A weight that is one percent too large has a direction, which can be looked for far below rounding.
Where a norm takes a scale out again, as those of queries and keys do, no activation can show it (digests of the weights
do); noise of one percent is tried there instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from loaders import Checkpoint
from loaders.reading.plan import specs_of
from loaders.stage import Stage
from parity.oracles.fault import Fault
from parity.trace_layout import MTP, PROBE, activations

SIZE = 0.01
SMALL_BYTES = 64 << 20  # a checkpoint under this is tried at MANY places, a larger one, which takes longer, at FEW
MANY, FEW = 64, 6
BLIND = 1e-3  # a scale that moves everything by less than this, of its size, is taken out by a norm behind it
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_MODULE = re.compile(r"(.+?)(?:\.weight(?:_packed)?)?")

Forward = Callable[[Fault], Mapping[str, np.ndarray]]


def places(checkpoint: Checkpoint, limit: int | None = None) -> dict[str, float]:
    """Modules to try, in order, and what the weight of each is counted from: every kind of weight in every layer.

    Args:
        checkpoint: of any family; its text model alone is tried.
        limit: at most so many, evenly taken; None: 64 of a checkpoint under 64 MiB, else 6. Each costs one pass of the
            oracle, or two where a scale does not show.
    Raises:
        ValueError: a limit below 0.
    """
    paths = [path for path in checkpoint.config.text_paths if f"{path}.embed_tokens.weight" in checkpoint.tensors]
    text = f"{(paths or checkpoint.config.text_paths)[0]}."
    found: set[tuple[int, str]] = set()
    for name in checkpoint.tensors:
        match = _LAYER.fullmatch(name.removeprefix(text)) if name.startswith(text) else None
        if match and (match[2].endswith((".weight", ".weight_packed")) or ".experts." in match[2]):
            module = _MODULE.fullmatch(re.sub(r"(\.experts)\.\d+\.", r"\1.*.", match[2]))
            if module and not re.search(r"_(scale|scale_2|shape|bias)$", module[1]):
                found.add((int(match[1]), module[1]))
    ends = [] if checkpoint.config.tie_word_embeddings else ["lm_head"]
    inside = [f"{text}layers.{layer}.{module}" for layer, module in sorted(found)]
    every = [f"{text}embed_tokens", *inside, f"{text}norm", *ends]
    if limit is not None and limit < 0:
        raise ValueError(f"{limit} places to try faults at, expected none or more")
    most = limit if limit is not None else MANY if checkpoint.num_bytes < SMALL_BYTES else FEW
    picked = np.unique(np.linspace(0, len(every) - 1, min(most, len(every))).round().astype(int))
    rules = specs_of(checkpoint.config, Stage(), checkpoint.tensors).rules
    centred = {name.removesuffix(".weight") for name, rule in rules.items() if rule.zero_centred}
    return {every[i]: float(every[i] in centred) for i in picked}


def probe(
    modules: Mapping[str, float], forward: Forward, exact: Mapping[str, np.ndarray], mask_BT: np.ndarray
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Try faults at ``modules``.

    Args:
        modules: see ``places``.
        forward: the oracle with a fault.
        exact: the oracle without one.
        mask_BT: bool [B, T], the positions that count.

    Returns:
        Tensors ``probe.i``, float16 [B, T, D]: how place i moves the first tensor it reaches, relative to the size of
        each token and of the fault; left out where that is the tensor itself, as of a norm whose weight is scaled. And
        what the trace's ``probes`` say, one document a place: ``module``, ``kind`` of the fault, ``size``, ``tensor``
        (the first it reaches) and ``moved``, relative L2 by tensor.
    """
    tensors: dict[str, np.ndarray] = {}
    documents: list[dict[str, Any]] = []
    names = [name for name in activations(exact) if name not in MTP]
    for module, origin in modules.items():
        kind: Literal["scale", "noise"] = "scale"
        found, moved = _tried(forward, Fault(module, SIZE, kind, origin), exact, names, mask_BT)
        if max(moved.values()) < BLIND * SIZE:
            kind = "noise"
            found, moved = _tried(forward, Fault(module, SIZE, kind, origin), exact, names, mask_BT)
        first = next((name for name in names if moved[name] > 0), names[-1])
        response = found[first] / (SIZE * np.maximum(np.linalg.norm(exact[first], axis=-1, keepdims=True), 1e-30))
        if not _is_itself(response, exact[first], mask_BT):
            tensors[f"{PROBE}{len(documents)}"] = np.where(mask_BT[..., None], response, 0).astype(np.float16)
        documents.append({"module": module, "kind": kind, "size": SIZE, "tensor": first, "moved": moved})
    return tensors, documents


def _tried(
    forward: Forward, fault: Fault, exact: Mapping[str, np.ndarray], names: list[str], mask_BT: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What a fault adds to every tensor, and its relative L2 over the real tokens."""
    faulty = forward(fault)
    found = {name: faulty[name] - exact[name] for name in names}
    sizes = {name: float(np.linalg.norm(exact[name][mask_BT])) for name in names}
    return found, {name: float(np.linalg.norm(found[name][mask_BT])) / max(sizes[name], 1e-30) for name in names}


def _is_itself(response: np.ndarray, exact: np.ndarray, mask_BT: np.ndarray) -> bool:
    unit = exact[mask_BT] / np.maximum(np.linalg.norm(exact[mask_BT], axis=-1, keepdims=True), 1e-30)
    return bool(np.abs(response[mask_BT] - unit).max(initial=0.0) < BLIND)
