"""The arrays of adapters: stacks and copies of a layout, placed on the devices; and the wrappers that read them.

They are an argument of every program. Their shapes depend on the layout alone, so adapters that come and go within it
find all programs compiled. Nothing here computes on a device: what is placed was made on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_models.layers.install import module_at
from jax_models.layers.linear import Embedding, Linear, project
from jax_models.layers.lora import (
    ExpertsWithLoRA,
    LinearWithLoRA,
    ModuleWithCopies,
    RouterWithCopies,
    RouterWithLoRA,
    Stacks,
    VocabParallelEmbeddingWithLoRA,
    Wrapper,
    unwrapped,
)
from jax_models.layers.moe import Experts, TopKRouter
from jax_models.layers.quantized import QuantizedLinear
from jax_models.layers.quantized_experts import NVFP4Experts
from jax_models.processes import placed
from jax_models.sharding import param_spec
from loaders.adapters.roster import NONE, Roster, padded
from loaders.adapters.sites import HEAD, Site, Sites, sites_of
from loaders.spec import ModelConfig

_EVERY = frozenset({"__call__", "project", "add_norm", "logits"})
Place = Callable[[np.ndarray, PartitionSpec], jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Copies:
    """Layers that adapters bring whole, all like one of the model's.

    ``tensors``: parameter of the layer -> [places, ...]. ``places``: int32 [slots + 1], see the wrapper.
    """

    tensors: dict[str, jax.Array]
    places: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowAdapters:
    """What a program is given of adapters: all of them, and which one each row has.

    Attributes:
        stacks: by site.
        copies: by module.
        slot: int32 [B], -1 for none.
    """

    stacks: dict[str, Stacks]
    copies: dict[str, Copies]
    slot: Any


@dataclass(frozen=True)
class Room:
    """The arrays of one roster, without rows."""

    stacks: dict[str, Stacks] = field(default_factory=dict)
    copies: dict[str, Copies] = field(default_factory=dict)

    def of_rows(self, slot_B: np.ndarray) -> RowAdapters:
        """What a program is given for rows of these slots."""
        return RowAdapters(self.stacks, self.copies, slot_B)


def room_for(
    roster: Roster, config: ModelConfig, dtypes: Mapping[str, Any], computed: Any, mesh: Mesh | None, like: jax.Array
) -> Room:
    """The arrays of a roster.

    Args:
        roster: the adapters.
        config: of the model.
        dtypes: parameters of this stage -> what they are stored in; copies of a module are stored alike.
        computed: dtype of a copy of a quantised module: what is computed in.
        mesh: devices the model is sharded over: an update is cut as its weight is, an embedding's not at all.
        like: a parameter, whose device is everybody's where there is no mesh.
    """
    sites, dims = sites_of(config), config.dims()
    here = {name.rpartition(".")[0] for name in dtypes}

    def put(array: np.ndarray, cuts: PartitionSpec) -> jax.Array:
        where = like.sharding if mesh is None else NamedSharding(mesh, cuts)
        return jax.device_put(placed(array, where), where)  # committed, as the weights are

    def cuts(tensor: str) -> PartitionSpec:
        return PartitionSpec() if mesh is None else param_spec(sites.parameter(tensor), dims, mesh)

    stacks = {
        path: _stacks(roster, site, rank, cuts(site.parameter), put)
        for path, rank in roster.layout.ranks.items()
        if (site := sites.low_rank[path]).module in here
    }
    copies: dict[str, Copies] = {}
    for module, places in roster.layout.places.items():
        if sites.layer(module) in here:
            leaves = sites.of_module(module)
            stored = {leaf: dtypes.get(sites.parameter(name).name, computed) for leaf, name in leaves.items()}
            is_quantized = any(dtype.itemsize == 1 for dtype in stored.values())
            stored = dict.fromkeys(stored, computed) if is_quantized else stored
            arrays, table = _copied(roster, module, places, sites, stored)
            tensors = {leaf: put(x, PartitionSpec(None, *cuts(leaves[leaf]))) for leaf, x in arrays.items()}
            copies[module] = Copies(tensors, put(table, PartitionSpec()))
    return Room(stacks, copies)


def _stacks(roster: Roster, site: Site, rank: int, cuts: PartitionSpec, put: Place) -> Stacks:
    out, inner = site.shape
    slots, lead, is_table = roster.layout.slots, site.lead, site.kind == "embedding"
    a = np.zeros((slots, *lead, *((inner, rank) if is_table else (rank, inner))), np.float32)
    b, scaling = np.zeros((slots, *lead, out, rank), np.float32), np.zeros(slots, np.float32)
    for one in roster.attached:
        if (update := one.adapter.low_rank.get(site.path)) is not None:
            half = padded(update.a, -2, rank)
            a[one.slot] = half.T if is_table else half
            b[one.slot], scaling[one.slot] = padded(update.b, -1, rank), update.scaling
    if is_table or not len(cuts):
        return Stacks(*(put(x, PartitionSpec()) for x in (a, b, scaling)))
    *by_lead, by_out, by_inner = cuts
    a_cuts, b_cuts = PartitionSpec(None, *by_lead, None, by_inner), PartitionSpec(None, *by_lead, by_out, None)
    return Stacks(put(a, a_cuts), put(b, b_cuts), put(scaling, PartitionSpec()))


def _copied(
    roster: Roster, module: str, places: int, sites: Sites, stored: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Tensors of the copies of a module, by leaf, and which place each slot has."""
    adapters, table = {one.slot: one.adapter for one in roster.attached}, roster.places(module)
    arrays: dict[str, np.ndarray] = {}
    for leaf, name in sites.of_module(module).items():
        arrays[leaf] = np.zeros((places, *sites.whole[name]), stored[leaf])
        for slot, place in table.items():
            arrays[leaf][place] = adapters[slot].whole[name].astype(stored[leaf])
    slots = [table.get(slot, NONE) for slot in range(roster.layout.slots)]
    return arrays, np.array([*slots, NONE], np.int32)


def wrap(model: Any, adapters: RowAdapters, config: ModelConfig) -> None:
    """Inside a program: put wrappers in the places of the layers that adapters change."""
    sites = sites_of(config)
    for module, copies in adapters.copies.items():
        path, methods = sites.layer(module), _EVERY
        if sites.tied and path == sites.layer(HEAD):  # a table with two sides
            methods = frozenset({"project"} if module == HEAD else {"__call__"})
        layer = module_at(model, path)
        kind = RouterWithCopies if isinstance(unwrapped(layer), TopKRouter) else ModuleWithCopies
        _put(model, path, kind(layer, layers_of(unwrapped(layer), copies), copies.places, methods))
    whole = {sites.layer(module) for module in adapters.copies}
    by_layer: dict[str, dict[str, Stacks]] = {
        path: {} for path in whole if isinstance(unwrapped(module_at(model, path)), Embedding)
    }
    for site, stacks in adapters.stacks.items():
        by_layer.setdefault(sites.low_rank[site].module, {})[site] = stacks
    for path, found in by_layer.items():
        _put(model, path, _with_lora(module_at(model, path), path, found))


def _with_lora(layer: Any, path: str, found: Mapping[str, Stacks]) -> Wrapper:
    match unwrapped(layer):
        case Experts() | NVFP4Experts():
            return ExpertsWithLoRA(layer, found.get(f"{path}.gate_up_proj"), found.get(f"{path}.down_proj"))
        case Embedding():
            return VocabParallelEmbeddingWithLoRA(layer, found.get(path), found.get(HEAD))
        case TopKRouter():
            return RouterWithLoRA(layer, found[path])
    return LinearWithLoRA(layer, found[path])


def layers_of(base: Any, copies: Copies) -> list[Any]:
    """Layers like ``base`` with tensors of their own; of a quantised one, plain."""
    if isinstance(base, QuantizedLinear):
        base = Linear(base.in_features, base.out_features, bias=base.has_bias)
    graphdef, _ = nnx.split(base)
    places = len(next(iter(copies.tensors.values())))
    if isinstance(base, Embedding):
        return [_Table(copies.tensors["weight"], place) for place in range(places)]
    return [nnx.merge(graphdef, {leaf: x[place] for leaf, x in copies.tensors.items()}) for place in range(places)]


@dataclass(frozen=True)
class _Table:
    """An embedding like ``layers.linear.Embedding`` whose table is one of several, [places, V, D]."""

    tables: jax.Array
    place: int

    def __call__(self, ids_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
        # on a TPU tables[place] would be a copy of all of it; not where it is multiplied
        return self.tables.at[self.place, ids_BT].get(mode="fill", fill_value=jnp.nan).astype(dtype)

    def project(self, x: jax.Array) -> jax.Array:
        return project(x, self.tables[self.place])


def _put(model: Any, path: str, layer: Any) -> None:
    owner, _, leaf = path.rpartition(".")
    setattr(module_at(model, owner), leaf, layer)
