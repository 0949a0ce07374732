"""The memory of adapters: stacks and copies of a layout, and the wrappers that read them. Filled in place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from loaders.adapter_sites import HEAD, Site, Sites, sites_of
from loaders.adapters import Adapter, LowRank
from loaders.roster import NONE, Roster, padded
from torch_models.layers.linear import Embedding, Linear
from torch_models.layers.lora import (
    ExpertsWithLoRA,
    LinearWithLoRA,
    ModuleWithCopies,
    Stacks,
    VocabParallelEmbeddingWithLoRA,
    unwrapped,
)
from torch_models.layers.moe import Experts
from torch_models.layers.quantized import FP8Linear, NVFP4Linear
from torch_models.layers.quantized_experts import NVFP4Experts
from torch_models.storage import of_host

if TYPE_CHECKING:
    from torch_models.model import Model

_EVERY = frozenset({"forward", "project", "add_norm"})


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
    """

    is_outside_census = True  # the wrappers hold all of it

    stacks: dict[str, Stacks] = field(default_factory=dict)
    copies: dict[str, Copies] = field(default_factory=dict)
    stands: list[tuple[nn.Module, str, nn.Module, nn.Module]] = field(default_factory=list)

    @classmethod
    def made(cls, model: Model, roster: Roster) -> Room:
        """Room as ``roster`` lays it out, filled, with wrappers that are not in the model yet."""
        room, sites = cls(), sites_of(model.config)
        layout, device = roster.layout, model.device
        bases = {path: unwrapped(module) for path, module in model.named_modules(remove_duplicate=False)}
        for path, rank in layout.ranks.items():
            if path.removesuffix(".gate_up_proj").removesuffix(".down_proj") in bases or path in bases:
                room.stacks[path] = _stacks(sites.low_rank[path], layout.slots, rank, device)
        for module, places in layout.places.items():
            if module in bases:
                leaves = {name.rpartition(".")[2]: name for name in sites.whole if name.rpartition(".")[0] == module}
                layers = [_copied(model, bases[module], leaves, sites) for _ in range(places)]
                table = torch.full((layout.slots + 1,), NONE, dtype=torch.int64, device=device)
                room.copies[module] = Copies(layers, leaves, table)
        room.refill(Roster(layout=layout), roster)
        wrappers = dict(room._wrappers(bases, is_tied=model.config.tie_word_embeddings))
        for parent in model.modules():
            for leaf, child in parent._modules.items():
                if child is not None and (wrapper := wrappers.get(id(unwrapped(child)))) is not None:
                    room.stands.append((parent, leaf, unwrapped(child), wrapper))
        return room

    def install(self, model: Model) -> None:
        """Put the wrappers in place."""
        for parent, leaf, _, wrapper in self.stands:
            parent._modules[leaf] = wrapper

    def remove(self) -> None:
        """Put the layers themselves back."""
        for parent, leaf, base, _ in self.stands:
            parent._modules[leaf] = base

    def refill(self, old: Roster, new: Roster) -> None:
        """Write what differs between two rosters of this layout; on any failure, what was there before again."""
        try:
            self._write(old, new)
        except BaseException:
            self._write(new, old)
            raise

    def _write(self, old: Roster, new: Roster) -> None:
        before = {one.slot: one.adapter for one in old.attached}
        after = {one.slot: one.adapter for one in new.attached}
        for slot in before.keys() | after.keys():
            if before.get(slot) is not after.get(slot):
                for path, stacks in self.stacks.items():
                    was, update = (_update(side.get(slot), path) for side in (before, after))
                    if was is not None or update is not None:
                        _fill(stacks, slot, update)
        for module, copies in self.copies.items():
            table, there = new.places(module), old.places(module)
            for slot, place in table.items():
                if there.get(slot) == place and before.get(slot) is after[slot]:
                    continue
                for leaf, name in copies.leaves.items():
                    held = copies.layers[place].get_parameter(leaf)
                    _put(held, of_host(after[slot].whole[name]).to(held.dtype))
            slots = [table.get(slot, NONE) for slot in range(len(copies.places) - 1)]
            _put(copies.places, torch.tensor([*slots, NONE]))

    def _wrappers(self, bases: dict[str, nn.Module], *, is_tied: bool) -> Iterator[tuple[int, nn.Module]]:
        """A wrapper for every layer that needs one, by the layer's identity."""
        made: dict[int, nn.Module] = {}
        for module, copies in self.copies.items():
            base = bases[module]
            is_table = is_tied and isinstance(base, Embedding)
            methods = frozenset({"project"} if module == HEAD else {"forward"}) if is_table else _EVERY
            within = made.get(id(base), base)
            made[id(base)] = ModuleWithCopies(within, copies.layers, copies.places, methods)
        for path in self.stacks:
            module = path if path in bases else path.rpartition(".")[0]
            base = bases[module]
            within = made.get(id(base), base)
            if isinstance(base, Experts | NVFP4Experts):
                gate_up, down = (self.stacks.get(f"{module}.{leaf}") for leaf in ("gate_up_proj", "down_proj"))
                wrapper: nn.Module = ExpertsWithLoRA(base, gate_up, down)
            elif isinstance(base, Embedding):
                lookups = [one for one in self.stacks if one != HEAD and bases.get(one) is base]
                lookup = self.stacks[lookups[0]] if lookups else None
                if isinstance(within, VocabParallelEmbeddingWithLoRA):
                    continue  # seen from its other side
                head = self.stacks.get(HEAD) if is_tied else None
                wrapper = VocabParallelEmbeddingWithLoRA(within, lookup, head)
            else:
                wrapper = LinearWithLoRA(within, self.stacks[path])
            made[id(base)] = wrapper
        yield from made.items()


def _stacks(site: Site, slots: int, rank: int, device: torch.device) -> Stacks:
    out, inner = site.shape
    a = (inner, rank) if site.kind == "embedding" else (rank, inner)
    shapes = ((slots, *site.lead, *a), (slots, *site.lead, out, rank), (slots,))
    return Stacks(*(torch.zeros(shape, device=device) for shape in shapes))


def _update(adapter: Adapter | None, path: str) -> LowRank | None:
    return None if adapter is None else adapter.low_rank.get(path)


def _fill(stacks: Stacks, slot: int, update: LowRank | None) -> None:
    """An update into its slot; None: zeros."""
    if update is None:
        for part in (stacks.a, stacks.b, stacks.scaling):
            part[slot].zero_()
        return
    rank = stacks.b.shape[-1]
    a = padded(update.a, -2, rank)
    _put(stacks.a[slot], of_host(a.swapaxes(-1, -2) if update.site.kind == "embedding" else a))
    _put(stacks.b[slot], of_host(padded(update.b, -1, rank)))
    _put(stacks.scaling[slot], torch.tensor(update.scaling, dtype=torch.float32))


def _put(place: torch.Tensor, value: torch.Tensor) -> None:
    """Copy and compare. Raises RuntimeError when other bytes arrived."""
    place.copy_(value)
    if not torch.equal(place.cpu(), value):
        raise RuntimeError("an adapter's tensor arrived with other bytes than were sent")


def _copied(model: Model, base: Any, leaves: dict[str, str], sites: Sites) -> nn.Module:
    """A layer like ``base`` with parameters of its own, in the dtypes of the base's; of a quantised one, plain."""
    if is_quantized := isinstance(base, NVFP4Linear | FP8Linear):
        other: nn.Module = Linear(base.in_features, base.out_features, bias=base.has_bias)
    else:
        other = type(base).__new__(type(base))
        other.__dict__.update(base.__dict__)
    other.__dict__["_parameters"] = {}
    for leaf, name in leaves.items():
        dtype = model.dtype if is_quantized else base.get_parameter(leaf).dtype
        zeros = torch.zeros(sites.whole[name], dtype=dtype, device=model.device)
        setattr(other, leaf, nn.Parameter(zeros, requires_grad=False))
    other.__dict__["_buffers"] = {leaf: buffer.clone() for leaf, buffer in base._buffers.items()}
    return other
