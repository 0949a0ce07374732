"""The memory of adapters: stacks and copies of a layout, and the wrappers that read them. Filled in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from loaders.adapters.roster import NONE, Roster, padded
from loaders.adapters.sites import HEAD, Site, Sites, sites_of
from loaders.adapters.updates import Adapter, LowRank
from loaders.spec import ParamSpec
from torch_models.layers.linear import Embedding, Linear
from torch_models.layers.lora import (
    ExpertsWithLoRA,
    LinearWithLoRA,
    ModuleWithCopies,
    RouterWithCopies,
    RouterWithLoRA,
    Stacks,
    VocabParallelEmbeddingWithLoRA,
    unwrapped,
)
from torch_models.layers.moe import Experts, TopKRouter
from torch_models.layers.quantized import QuantizedLinear
from torch_models.layers.quantized_experts import NVFP4Experts
from torch_models.parallel import Parallel
from torch_models.storage import of_host

if TYPE_CHECKING:
    from torch_models.model import Model

_EVERY = frozenset({"forward", "project", "add_norm", "logits"})
Changes = list[tuple[torch.Tensor, torch.Tensor]]  # places, and values on the host of their shapes and dtypes
# what is here of something that goes with a parameter; see ``Parallel.part_along``
Part = Callable[[str, np.ndarray, Sequence[int | None]], np.ndarray]


def _all(name: str, array: np.ndarray, axes: Sequence[int | None]) -> np.ndarray:
    return array


@dataclass(frozen=True)
class Copies:
    """Layers that adapters bring whole, all like one of the model's, by place.

    ``leaves``: parameter of the layer -> name of the tensor it is. ``places``: int64 [slots + 1], see the wrapper.
    """

    layers: list[nn.Module]
    leaves: dict[str, str]
    places: torch.Tensor


@dataclass
class Room:
    """Memory for the adapters of one layout, and what stands in the model to use it.

    Attributes:
        stacks: by site.
        copies: by module.
        stands: parent, name there, the layer itself, and the wrapper in its place.
        unmerged: while an adapter is merged, the weights from before, by name, on the host.
        part: see ``Part``.
    """

    is_outside_census = True  # the wrappers hold all that runs

    stacks: dict[str, Stacks] = field(default_factory=dict)
    copies: dict[str, Copies] = field(default_factory=dict)
    stands: list[tuple[nn.Module, str, nn.Module, nn.Module]] = field(default_factory=list)
    unmerged: dict[str, torch.Tensor] = field(default_factory=dict)
    part: Part = _all

    @classmethod
    def made(cls, model: Model, roster: Roster) -> Room:
        """Room as ``roster`` lays it out, filled, with wrappers that are not in the model yet."""
        sites, layout = sites_of(model.config), roster.layout
        room = cls() if model.parallel is None else cls(part=_parts(model.parallel, sites))
        layers = {path: unwrapped(module) for path, module in model.named_modules(remove_duplicate=False)}
        for path, rank in layout.ranks.items():
            if (site := sites.low_rank[path]).module in layers:  # else another stage's
                room.stacks[path] = _stacks(model, site, sites, layout.slots, rank)
        for module, places in layout.places.items():
            if (layer := sites.layer(module)) in layers:
                leaves = sites.of_module(module)
                copies = [_copied(model, layers[layer], leaves, sites) for _ in range(places)]
                table = torch.full((layout.slots + 1,), NONE, dtype=torch.int64, device=model.device)
                room.copies[module] = Copies(copies, leaves, table)
        write(room.changes(Roster(layout=layout), roster))
        wrappers = {id(layers[path]): wrapper for path, wrapper in room._wrappers(layers, sites).items()}
        for parent in model.modules():
            for leaf, child in parent._modules.items():
                if child is not None and (wrapper := wrappers.get(id(unwrapped(child)))) is not None:
                    room.stands.append((parent, leaf, unwrapped(child), wrapper))
        return room

    def install(self) -> None:
        """Put the wrappers in place."""
        for parent, leaf, _, wrapper in self.stands:
            parent._modules[leaf] = wrapper

    def remove(self) -> None:
        """Put the layers themselves back."""
        for parent, leaf, base, _ in self.stands:
            parent._modules[leaf] = base

    def changes(self, old: Roster, new: Roster) -> Changes:
        """What has to be written where two rosters of this layout differ. Nothing is written."""
        made: Changes = []
        before = {one.slot: one.adapter for one in old.attached}
        after = {one.slot: one.adapter for one in new.attached}
        for slot in before.keys() | after.keys():
            if before.get(slot) is not after.get(slot):
                for path, stacks in self.stacks.items():
                    was, update = (_update(side.get(slot), path) for side in (before, after))
                    if was is not None or update is not None:
                        made += _fill(stacks, slot, update, self.part)
        for module, copies in self.copies.items():
            table, there = new.places(module), old.places(module)
            for slot, place in table.items():
                if there.get(slot) == place and before.get(slot) is after[slot]:
                    continue
                for leaf, name in copies.leaves.items():
                    held = copies.layers[place].get_parameter(leaf)
                    value = self.part(name, after[slot].whole[name], range(held.ndim))
                    made.append((held, of_host(value).to(held.dtype)))
            slots = [table.get(slot, NONE) for slot in range(len(copies.places) - 1)]
            made.append((copies.places, torch.tensor([*slots, NONE], device="cpu")))
        return made

    def _wrappers(self, layers: Mapping[str, nn.Module], sites: Sites) -> dict[str, nn.Module]:
        """Path of a layer -> what is to stand in its place."""
        made: dict[str, nn.Module] = {}
        for module, copies in self.copies.items():
            path, methods = sites.layer(module), _EVERY
            if sites.tied and path == sites.layer(HEAD):  # a table with two sides
                methods = frozenset({"project"} if module == HEAD else {"forward"})
            kind = RouterWithCopies if isinstance(layers[path], TopKRouter) else ModuleWithCopies
            made[path] = kind(made.get(path, layers[path]), copies.layers, copies.places, methods)
        by_layer: dict[str, dict[str, Stacks]] = {path: {} for path in made if isinstance(layers[path], Embedding)}
        for site, stacks in self.stacks.items():
            by_layer.setdefault(sites.low_rank[site].module, {})[site] = stacks
        return made | {path: _with_lora(made.get(path, layers[path]), path, found) for path, found in by_layer.items()}


def _with_lora(layer: nn.Module, path: str, found: Mapping[str, Stacks]) -> nn.Module:
    match unwrapped(layer):
        case Experts() | NVFP4Experts():
            return ExpertsWithLoRA(layer, found.get(f"{path}.gate_up_proj"), found.get(f"{path}.down_proj"))
        case Embedding():
            return VocabParallelEmbeddingWithLoRA(layer, found.get(path), found.get(HEAD))
        case TopKRouter():
            return RouterWithLoRA(layer, found[path])
    return LinearWithLoRA(layer, found[path])


def _parts(parallel: Parallel, sites: Sites) -> Part:
    return lambda name, array, axes: parallel.part_along(sites.parameter(name), array, axes)


def _shape(model: Model, spec: ParamSpec) -> tuple[int, ...]:
    """Of a parameter, as it is here and without quantisation."""
    return spec.shape if model.parallel is None else model.parallel.held.sizes_of(spec)


def _stacks(model: Model, site: Site, sites: Sites, slots: int, rank: int) -> Stacks:
    """An update is cut as its weight is, a table's that is looked up not at all."""
    if site.kind == "embedding":
        (out, inner), lead = site.shape, ()
        a = (inner, rank)
    else:
        *lead, out, inner = _shape(model, sites.parameter(site.parameter))
        a = (rank, inner)
    shapes = ((slots, *lead, *a), (slots, *lead, out, rank), (slots,))
    return Stacks(*(torch.zeros(shape, dtype=torch.float32, device=model.device) for shape in shapes))


def _update(adapter: Adapter | None, path: str) -> LowRank | None:
    return None if adapter is None else adapter.low_rank.get(path)


def write(changes: Changes) -> None:
    """Write values to their places. Raises RuntimeError when other bytes arrived; then there is some of both."""
    for place, value in changes:
        _put(place, value)


def _fill(stacks: Stacks, slot: int, update: LowRank | None, part: Part) -> Changes:
    """What an update's slot is to hold; None: zeros."""
    if update is None:
        places = [stack[slot] for stack in (stacks.a, stacks.b, stacks.scaling)]
        return [(place, torch.zeros(place.shape, dtype=place.dtype, device="cpu")) for place in places]
    rank, site = stacks.b.shape[-1], update.site
    a, b = padded(update.a, -2, rank), padded(update.b, -1, rank)
    if site.kind == "embedding":
        a = a.swapaxes(-1, -2)
    else:
        lead = range(len(site.lead))
        a = part(site.parameter, a, (*lead, None, len(lead) + 1))
        b = part(site.parameter, b, (*lead, len(lead), None))
    scaling = torch.tensor(update.scaling, dtype=torch.float32, device="cpu")
    return [(stacks.a[slot], of_host(a)), (stacks.b[slot], of_host(b)), (stacks.scaling[slot], scaling)]


def _put(place: torch.Tensor, value: torch.Tensor) -> None:
    """Copy and compare. Raises RuntimeError when other bytes arrived."""
    place.copy_(value)
    if not torch.equal(place.cpu(), value):
        raise RuntimeError("an adapter's tensor arrived with other bytes than were sent")


def _copied(model: Model, base: Any, leaves: dict[str, str], sites: Sites) -> nn.Module:
    """A layer like ``base`` with parameters of its own, in the dtypes of the base's; of a quantised one, plain."""
    if is_quantized := isinstance(base, QuantizedLinear):
        other: nn.Module = Linear(base.in_features, base.out_features, bias=base.has_bias)
        other.summed, other.gathered = base.summed, base.gathered
    else:
        other = copy.copy(base)  # its dictionaries of tensors are still the base's
    other.__dict__["_parameters"] = {}
    for leaf, name in leaves.items():
        dtype = model.dtype if is_quantized else base.get_parameter(leaf).dtype
        zeros = torch.zeros(_shape(model, sites.parameter(name)), dtype=dtype, device=model.device)
        setattr(other, leaf, nn.Parameter(zeros, requires_grad=False))
    other.__dict__["_buffers"] = {leaf: buffer.clone() for leaf, buffer in base.named_buffers(recurse=False)}
    return other
