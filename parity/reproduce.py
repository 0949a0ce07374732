"""The command that shows a failure again, alone: what a person does next."""

from __future__ import annotations

import shlex

from parity.comparison.case import Case
from parity.comparison.findings import Divergence
from parity.trace_layout import MTP

RECORDABLE = ("jax", "torch")


def bisect_command(case: Case, divergence: Divergence | None) -> str | None:
    """``tandem bisect`` of what a failing comparison compared; None where the traces do not say what that was.

    ``--layer N`` is ``model.layers.N``, where the error begins.
    """
    metas = case.a.meta, case.b.meta
    checkpoints = [meta.get("checkpoint") or "" for meta in metas]
    roots = [(meta.get("weights") or {}).get("root") for meta in metas]
    is_one = checkpoints[0] == checkpoints[1] or (roots[0] is not None and roots[0] == roots[1])
    if not is_one or "" in checkpoints or any(meta["backend"] not in RECORDABLE for meta in metas):
        return None
    adapters = {meta.get("adapter") for meta in metas}
    is_adapted = any((meta.get("precision") or {}).get("adapter") for meta in metas)
    if len(adapters) > 1 or (is_adapted and adapters == {None}):  # several, or merged
        return None
    if divergence is not None and divergence.tensor in MTP:  # nothing looks into a draft
        return None
    words = ["tandem", "bisect", checkpoints[0], "--a", metas[0]["backend"], "--b", metas[1]["backend"]]
    words += ["--dtype", metas[0]["dtype"]]
    inputs = {meta.get("inputs") for meta in metas}
    if len(inputs) == 1 and (given := inputs.pop()):
        words += ["--inputs", given]
    words += ["--adapter", adapter] if (adapter := adapters.pop()) else []
    steps = {meta.get("decode", 0) for meta in metas}
    words += ["--decode", str(steps.pop())] if steps != {0} and len(steps) == 1 else []
    rows = {meta.get("row") for meta in metas}
    words += ["--row", str(rows.pop())] if rows != {None} and len(rows) == 1 else []
    layer = _layer(divergence)
    words += ["--layer", str(layer - 1)] if layer else []
    return shlex.join(words)


def live_command(divergence: Divergence | None, *, has_adapter: bool = False) -> str:
    """The same of two models that live in this process, as a notebook calls it: files do not have their bugs."""
    options = ["checkpoint=pair.checkpoint"]
    options += (
        ["adapter=loaders.adapters.opening.open_adapter(pair.adapter, pair.checkpoint.config)"] if has_adapter else []
    )
    layer = _layer(divergence)
    options += [f"layer={layer - 1}"] if layer else []
    return f"parity.bisect(pair.a, pair.b, pair.inputs, {', '.join(options)})"


def _layer(divergence: Divergence | None) -> int | None:
    """The decoder layer to look at, from 1 (0: the embeddings): where the error began, else where it first fails."""
    if divergence is None:
        return None
    suspect = divergence.suspect or divergence.tensor
    number = suspect.removeprefix("hidden_states.")
    return int(number) if number.isdigit() else None
