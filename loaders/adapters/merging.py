"""Adapters merged into weights: on the host, in float32, rounded once; so both backends get the same bits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from loaders.adapters.sites import HEAD, sites_of
from loaders.adapters.updates import Adapter, LowRank
from loaders.reading.plan import specs_of
from loaders.spec import ModelConfig
from loaders.stage import Stage

log = logging.getLogger(__name__)

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


def whole_overflows(adapter: Adapter, config: ModelConfig, stored: Mapping[str, np.dtype]) -> list[str]:
    """Tensors of ``modules_to_save`` beyond the range of those they replace, in whose dtype they are held.

    Args:
        adapter: to be attached.
        config: of the model.
        stored: parameters that are here -> their dtype.
    """
    sites, problems = sites_of(config), []
    for name, value in adapter.whole.items():
        dtype = stored.get(sites.parameter(name).name)
        if dtype is None or dtype.itemsize == 1 or not value.size:  # a quantised layer's copy is not quantised
            continue
        most = max(float(value.max()), -float(value.min()))
        if dtype.itemsize < value.dtype.itemsize:
            log.warning("adapter: %r is held in %s, as the model's own is, and not in %s", name, dtype, value.dtype)
        if not _is_finite(np.float32(most), dtype):
            problems.append(
                f"tensor {name!r} has numbers up to {most:g}, more than {dtype} holds, in which the model has it"
            )
    return problems


def merge_overflows(adapter: Adapter, stored: Mapping[str, np.dtype], read_base: Read) -> list[str]:
    """Parameters that would not be finite once the adapter is merged; of those that are here.

    Only where an update is so large that it might be is it computed.
    """
    problems = []
    for update in adapter.low_rank.values():
        name = update.site.parameter
        if (dtype := stored.get(name)) is None or not update.a.size:
            continue
        most = abs(update.scaling) * update.rank * float(np.abs(update.a).max()) * float(np.abs(update.b).max())
        limits = ml_dtypes.finfo(dtype)
        if most < float(limits.max) * float(limits.eps) / 4:  # less than half of the last step to the largest number
            continue
        base = read_base(name)
        with np.errstate(over="ignore"):
            after = merged(base, update)
        if (np.isfinite(base) & ~np.isfinite(after)).any():
            problems.append(f"{name!r} would have numbers that {dtype} does not hold")
    return problems


def _is_finite(number: np.floating, dtype: np.dtype) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isfinite(number.astype(dtype)))


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
