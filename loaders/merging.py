"""Adapters merged into weights: on the host, in float32, rounded once; so both backends get the same bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from loaders.adapter_sites import HEAD
from loaders.adapter_updates import Adapter, LowRank
from loaders.plan import specs_of
from loaders.spec import ModelConfig
from loaders.stage import Stage

Read = Callable[[str], np.ndarray]  # a parameter as it is stored, by name
_ROWS = 8192  # merged at once


def merged(base: np.ndarray, update: LowRank) -> np.ndarray:
    """The base's weight with an update in it: float32 sums, rounded once to the dtype it is stored in.

    Args:
        base: the parameter as it is stored, of an embedding [V, D].
        update: of that parameter.
    """
    out = np.empty_like(base)
    if update.site.kind == "embedding":
        for row in range(0, len(base), _ROWS):
            rows = slice(row, row + _ROWS)
            delta = np.float32(update.scaling) * (update.a[:, rows].T @ update.b.T)
            out[rows] = (base[rows].astype(np.float32) + delta).astype(base.dtype)
        return out
    if update.site.kind == "experts":
        for place in np.ndindex(*update.site.lead):
            delta = np.float32(update.scaling) * (update.b[place] @ update.a[place])
            out[place] = (base[place].astype(np.float32) + delta).astype(base.dtype)
        return out
    for row in range(0, len(base), _ROWS):
        rows = slice(row, row + _ROWS)
        out[rows] = (base[rows].astype(np.float32) + update.delta(rows)).astype(base.dtype)
    return out


def merge_problems(adapter: Adapter, config: ModelConfig) -> list[str]:
    """Why an adapter cannot be merged, one sentence each."""
    schemes = specs_of(config, Stage()).schemes
    changed = [update.site.parameter for update in adapter.low_rank.values()] + list(adapter.whole)
    quantized = sorted({name for name in changed if name in schemes or name.rpartition(".")[0] in schemes})
    problems = []
    if quantized:
        more = f" and {len(quantized) - 1} more" if len(quantized) > 1 else ""
        problems.append(f"{quantized[0]}{more} is quantised, and rounding it again would be another model")
    tables = {
        f"{HEAD}.weight",
        HEAD,
        f"{config.text_paths[0]}.embed_tokens.weight",
        f"{config.text_paths[0]}.embed_tokens",
    }
    if config.tie_word_embeddings and tables & {*adapter.low_rank, *adapter.whole}:
        problems.append("embedding and head are one table, and it adapts one side of it")
    return problems


def merged_weights(adapter: Adapter, read_base: Read) -> Mapping[str, Callable[[], np.ndarray]]:
    """Every parameter that merging changes, by name, and how to compute it."""
    changed = {
        update.site.parameter: (lambda update=update: merged(read_base(update.site.parameter), update))
        for update in adapter.low_rank.values()
    }
    return changed | {
        name: (lambda name=name, value=value: value.astype(read_base(name).dtype))
        for name, value in adapter.whole.items()
    }
