"""Mutants of adapters: how they are read, scaled, added and chosen, and what becomes of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from parity.mutants import Mutant, Patch
from parity.mutants.bench import Subject
from parity.mutants.life_list import any_version
from parity.mutants.lora_bench import adapted, adapter_life
from parity.mutants.plants import BOTH, DENSE, HALF, MOE, TIED, of, wrapped

_SCALING = "loaders.adapters.config:AdapterConfig.scaling"
_ROWS = "loaders.adapters.roster:Roster.rows"
_OPEN = "adapters:open_adapter"
_STACKS, _TABLE = "layers.lora:Stacks", "layers.lora:VocabParallelEmbeddingWithLoRA"
_LINEAR = "layers.lora:LinearWithLoRA"


def _over_rank(scaling: Any, self: Any, module: str) -> float:
    return scaling(self, module) / (math.sqrt(self.rank(module)) if self.use_rslora else 1.0)


def _without(pattern: str) -> Callable[..., float]:
    def scaling(original: Any, self: Any, module: str) -> float:
        return original(dataclasses.replace(self, **{pattern: {}}), module)

    return scaling


def _edited(edit: Callable[[Any], Any]) -> Callable[[], list[Patch]]:
    """Every adapter that is opened comes out another one."""
    return wrapped(_OPEN, lambda opened, *args, **options: edit(opened(*args, **options)))


def _each(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def edit(adapter: Any) -> Any:
        return dataclasses.replace(adapter, low_rank={path: change(one) for path, one in adapter.low_rank.items()})

    return edit


def _read_across(update: Any) -> Any:
    """A as if it were stored [in, r]."""
    flipped = update.a.swapaxes(-1, -2).reshape(update.a.shape)
    return dataclasses.replace(update, a=np.ascontiguousarray(flipped))


def _by_expert(update: Any) -> Any:
    """B of experts as if its columns were sorted by expert, and not by rank."""
    if update.site.kind != "experts":
        return update
    E, *_, r = update.b.shape
    by_rank = np.moveaxis(update.b, 0, -1)  # [..., r, E], as it is stored
    return dataclasses.replace(update, b=np.moveaxis(by_rank.reshape(*by_rank.shape[:-2], E, r), -2, 0))


def _one_less(adapter: Any) -> Any:
    skipped = "model.layers.1.self_attn.v_proj"
    return dataclasses.replace(adapter, low_rank={p: one for p, one in adapter.low_rank.items() if p != skipped})


def _nothing_whole(adapter: Any) -> Any:
    return dataclasses.replace(adapter, whole={})


def _rolled(rows: Any, self: Any, adapter: Any, count: int) -> Any:
    return np.roll(rows(self, adapter, count), 1)


def _all_alike(rows: Any, self: Any, adapter: Any, count: int) -> Any:
    found = rows(self, adapter, count)
    return np.full_like(found, found[0])


def _base_is_first(rows: Any, self: Any, adapter: Any, count: int) -> Any:
    return np.maximum(rows(self, adapter, count), 0)


def _also_merged(rows: Any, self: Any, adapter: Any, count: int) -> Any:
    return rows(dataclasses.replace(self, merged=None), adapter, count)


def _twice(delta: Any, self: Any, x: Any, slot: int) -> Any:
    return delta(self, x, slot) * self.scaling[slot]


def _unscaled(delta: Any, self: Any, x: Any, slot: int) -> Any:
    return delta(self, x, slot) / self.scaling[slot]


def _lookup_in_head(project: Any, self: Any, x: Any) -> Any:
    found = project(self, x)
    return (
        found if self.lookup is None else found + (x @ self.lookup.b[0] @ self.lookup.a[0].T) * self.lookup.scaling[0]
    )


def _head_in_lookup(forward: Any, self: Any, ids: Any, dtype: Any) -> Any:
    found = forward(self, ids, dtype)
    return found if self.head is None else found + (self.head.b[0][ids] @ self.head.a[0]) * self.head.scaling[0]


def _up_before_gate(first: Any, self: Any, parts: Any, *rest: Any) -> Any:
    return first(self, parts[::-1], *rest)[::-1]


def _kept_weight(forward: Any, self: Any, x: Any) -> Any:
    """The base's product with the weight that was there when the adapter came."""
    if "kept" not in self.__dict__:
        self.__dict__["kept"] = self.weight.detach().clone()
    return forward(self, x) + x @ (self.__dict__["kept"] - self.weight).T


def _first_stays(changes: Any, self: Any, old: Any, new: Any) -> Any:
    return [] if old.attached else changes(self, old, new)


def _slot_not_cleared(fill: Any, stacks: Any, slot: int, update: Any, part: Any) -> Any:
    return [] if update is None else fill(stacks, slot, update, part)


def _registered(init: Any, self: Any, base_layer: Any) -> None:
    """The usual wrapper: what it wraps is a module of its own below it."""
    from torch import nn

    init(self, base_layer)
    own = dict(base_layer.__dict__)
    own["_parameters"], own["_modules"] = {}, {"base_layer": base_layer}
    assert isinstance(self, nn.Module)
    object.__setattr__(self, "__dict__", own)


def _subtracted(unmerge: Any, model: Any) -> Any:
    from loaders.adapters.merging import merged_weights
    from torch_models.storage import host_view, of_host

    low_rank = model.adapters[model.roster.merged].adapter.low_rank
    taken = {path: dataclasses.replace(one, scaling=-one.scaling) for path, one in low_rank.items()}
    less = dataclasses.replace(model.adapters[model.roster.merged].adapter, low_rank=taken)
    makers = merged_weights(less, lambda name: host_view(model.get_parameter(name)))
    model.room.unmerged = {name: of_host(make()) for name, make in makers.items()}
    return unmerge(model)


def _of(name: str, source: str, plant: Callable[[], Any], says: str, subject: Subject = DENSE, **more: Any) -> Mutant:
    return of("lora", name, source, plant, says, subject, **({"detector": adapted} | more))


def _life(name: str, source: str, plant: Callable[[], Any], says: str, subject: Subject = DENSE, **more: Any) -> Mutant:
    return _of(name, source, plant, says, subject, detector=adapter_life, **more)


LORA: list[Mutant] = [
    _of(
        "lora_over_rank", "parity 45", wrapped(_SCALING, _over_rank), "alpha / r where it is alpha / √r", backends=BOTH
    ),
    _of(
        "lora_rank_pattern_ignored",
        "issue lora",
        wrapped(_SCALING, _without("rank_pattern")),
        "scaled by the rank of all",
    ),
    _of(
        "lora_alpha_pattern_ignored",
        "issue lora",
        wrapped(_SCALING, _without("alpha_pattern")),
        "scaled by alpha of all",
    ),
    _of("lora_read_across", "parity 46", _edited(_each(_read_across)), "A read as [in, r]", backends=BOTH),
    _of("lora_misses_a_target", "parity 47", _edited(_one_less), "one projection is left out"),
    _of("lora_whole_ignored", "issue lora", _edited(_nothing_whole), "modules_to_save are left out"),
    _of("lora_experts_by_expert", "issue lora", _edited(_each(_by_expert)), "B of experts sorted by expert", MOE),
    _of(
        "lora_up_before_gate",
        "issue lora",
        wrapped("layers.lora:ExpertUpdates.parts", _up_before_gate),
        "updates of gate and up exchanged",
        MOE,
    ),
    _of(
        "lora_rows_rolled", "parity 50", wrapped(_ROWS, _rolled), "every row has its neighbour's adapter", backends=BOTH
    ),
    _of(
        "lora_rows_alike",
        "parity 50",
        wrapped(_ROWS, _all_alike),
        "every row has the first one's adapter",
        backends=BOTH,
    ),
    _of("lora_base_row_adapted", "parity 50", wrapped(_ROWS, _base_is_first), "a row without adapter has the first"),
    _of(
        "lora_scaled_twice", "parity 48", wrapped(f"{_STACKS}.delta", _twice), "updates are scaled twice", backends=BOTH
    ),
    _of("lora_unscaled", "parity 45", wrapped(f"{_STACKS}.delta", _unscaled), "updates are not scaled"),
    _of(
        "lora_lookup_in_head",
        "issue lora",
        wrapped(f"{_TABLE}.project", _lookup_in_head),
        "a tied head has the embedding's update",
        TIED,
    ),
    _of(
        "lora_head_in_lookup",
        "issue lora",
        wrapped(f"{_TABLE}.CALL", _head_in_lookup),
        "a tied embedding has the head's update",
        TIED,
    ),
    _life(
        "lora_replaced_stays",
        "issue lora",
        wrapped("adapter_room:Room.changes", _first_stays),
        "another adapter of the same name is not written",
    ),
    _life(
        "lora_slot_not_cleared",
        "issue lora",
        wrapped("adapter_room:_fill", _slot_not_cleared),
        "a slot keeps what its next adapter does not have",
    ),
    _life(
        "lora_cache_of_another",
        "law 7",
        wrapped("decoding:Decoding.decode", any_version),
        "keys of the adapter before are taken",
    ),
    _life(
        "lora_old_base",
        "law 1",
        wrapped(f"{_LINEAR}.forward", _kept_weight),
        "a reload does not reach an adapted layer",
    ),
    _life(
        "lora_base_layer_named",
        "law 9",
        wrapped("layers.lora:Wrapper.__init__", _registered),
        "names get base_layer in them",
        refusal=Exception,
    ),
    _life(
        "lora_merged_and_added",
        "parity 48",
        wrapped(_ROWS, _also_merged),
        "a merged adapter is added once more",
        backends=BOTH,
    ),
    _life(
        "lora_unmerged_by_subtraction",
        "parity 49",
        wrapped("adapters:unmerge_lora", _subtracted),
        "a merge is undone by arithmetic",
        HALF,
    ),
]
