"""Tensor and expert parallelism: which part of each parameter a rank holds, and what joins what it computes of it.

A rank runs the same modules on its part of the weights: some of the heads, of an MLP's width, of the experts, of the
vocabulary. Parts of sums are added where a layer's inputs were cut, logits put side by side. Every rank says
the same. Transport is torch.distributed's, over the mesh's own groups: gloo on CPUs, nccl on GPUs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from loaders.axes import Cut, axes_of
from loaders.reading.held import Held, in_blocks
from loaders.reading.plan import LoadPlan
from loaders.spec import ParamSpec
from torch_models.coordination import coordinator
from torch_models.layers.attention import Attention
from torch_models.layers.gated_attention import GatedAttention
from torch_models.layers.gated_delta import GatedDeltaNet
from torch_models.layers.linear import Embedding, Linear
from torch_models.layers.moe import Experts
from torch_models.layers.quantized import NVFP4Linear, QuantizedLinear
from torch_models.layers.quantized_experts import NVFP4Experts
from torch_models.layers.step import Entry
from torch_models.storage import host_view

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

MESH_AXES = ("expert", "tensor")


class Parallel:
    """A mesh as one of its ranks sees it.

    Attributes:
        held: the part of everything that is here.
        head: the module that has it; None: another stage's.

    Args:
        mesh: with named axes among ``expert`` and ``tensor``, of all processes.
        plan: what is loaded; says how every parameter is cut.
    Raises:
        ValueError: as ``check_mesh``.
    """

    def __init__(self, mesh: DeviceMesh, plan: LoadPlan) -> None:
        names = check_mesh(mesh)
        place = mesh.get_coordinate()
        assert place is not None, "the mesh is of all processes"
        self.mesh = mesh
        self.sizes = dict(zip(names, mesh.shape, strict=True))
        here, dims = dict(zip(names, place, strict=True)), plan.checkpoint.config.dims()
        self.held = Held(self.sizes, here, dims, in_blocks(plan.specs))
        self.head = plan.specs.head and plan.specs.head.rpartition(".")[0]
        self.params = {spec.name: spec for spec in plan.specs}
        self.cuts = {spec.name: self.held.cuts(spec) for spec in plan.specs}

    def install(self, model: nn.Module) -> None:
        """Tell the layers of a loaded model what they hold, and what joins it. Every rank has loaded it by now."""
        for path, module in model.named_modules():
            if isinstance(module, Linear | QuantizedLinear):
                leaf = module.scheme.leaves["codes"] if isinstance(module, NVFP4Linear) else "weight"
                by_output, by_input = self._cuts(f"{path}.{leaf}")
                module.summed = self.sum_over(by_input)
                module.gathered = self.gather_over(by_output) if path == self.head else None
            elif isinstance(module, Embedding):
                by_row, _ = self._cuts(f"{path}.weight")
                module.summed, module.gathered = self.sum_over(by_row), self.gather_over(by_row)
                module.held = range(*self.held.ends(module.num_embeddings, by_row)) if by_row else None
            elif isinstance(module, Experts | NVFP4Experts):
                is_plain = isinstance(module, Experts)
                leaf = "down_proj" if is_plain else f"w2_{module.scheme.leaves['codes']}"
                by_expert, _, by_width = self.cuts[f"{path}.{leaf}"]
                module.summed = self.sum_over((*axes_of(by_expert), *axes_of(by_width)))
                module.hold(range(*self.held.ends(module.num_experts, by_expert)) if by_expert else None)
            elif isinstance(module, Attention | GatedAttention):
                module.hold(self.held.asked())
            elif isinstance(module, GatedDeltaNet):
                module.hold(self.held.segments("QKV"), *self.held.segments("LN"))

    def sum_over(self, cut: Cut) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What adds the parts that ranks along ``cut`` have, in float32; None: there is one part."""
        groups = [self.mesh.get_group(axis) for axis in axes_of(cut)]

        def summed(x: torch.Tensor) -> torch.Tensor:
            total = x.float() if x.dtype != torch.float32 else x.clone()
            for group in groups:
                coordinator().finish(dist.all_reduce(total, group=group, async_op=True), total.device.type)
            return total.to(x.dtype)

        return summed if groups else None

    def gather_over(self, cut: Cut) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What puts the parts along ``cut`` side by side on the last axis; None: there is one part."""
        return (lambda x: self._gather(x, cut, x.ndim - 1)) if cut else None

    def whole(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """A parameter of its parts, which all ranks have to hand over at the same time."""
        with coordinator().call():
            for axis, (letter, cut) in enumerate(zip(self.params[name].axes, self.cuts[name], strict=True)):
                if cut:
                    segments = part.split(self.held.segments(letter), dim=axis)
                    part = _side_by_side([self._gather(one, cut, axis) for one in segments], axis)
        return part

    def part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """What is here of a parameter's new value."""
        boxes = self.held.boxes(self.params[name])
        return self.joined(name, [whole[tuple(slice(*ends) for ends in box)] for box in boxes]).contiguous()

    def part_along(self, spec: ParamSpec, array: np.ndarray, axes: Sequence[int | None]) -> np.ndarray:
        """What is here of something that goes with a parameter.

        Args:
            spec: the parameter, as it would be without quantisation.
            array: with axes of the parameter's sizes, and others.
            axes: which of the parameter's each of its axes is; None: one that is whole.
        """
        runs = self.held.runs(spec)
        for axis, of_param in enumerate(axes):
            if of_param is not None and runs[of_param] != [(0, spec.shape[of_param])]:
                index = np.concatenate([np.arange(*ends) for ends in runs[of_param]])
                array = array.take(index, axis)
        return array

    def joined(self, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
        """What is here of a parameter, of what is in each of its boxes here."""
        axes = [axis for axis, letter in enumerate(self.params[name].axes) if len(self.held.segments(letter)) > 1]
        return _side_by_side(parts, *axes)

    def as_dtensor(self, name: str, part: torch.Tensor) -> DTensor:
        """A parameter as all ranks hold it together; its memory is the parameter's."""
        from torch.distributed.tensor import DTensor, Replicate, Shard  # a second, which only meshes pay
        from torch.distributed.tensor.placement_types import _StridedShard

        order = list(self.sizes)
        placements: list[Any] = [Replicate()] * len(order)
        for axis, cut in enumerate(self.cuts[name]):
            outer: list[str] = []
            for mesh_axis in axes_of(cut):
                place = order.index(mesh_axis)
                # of two axes that cut one, torch takes the mesh's first for the outermost, unless it is told
                later = math.prod(self.sizes[each] for each in outer if order.index(each) > place)
                placements[place] = Shard(axis) if later == 1 else _StridedShard(axis, split_factor=later)
                outer.append(mesh_axis)
        return DTensor.from_local(part, self.mesh, placements, run_check=False)

    def gathers(self, value: Any) -> bool:
        """Whether all ranks have a part of it: then each has to ask for the whole."""
        from torch.distributed.tensor import DTensor

        return isinstance(value, DTensor)

    def gathered(self, value: Any) -> Any:
        """All of a DTensor, which every rank has to hand over; anything else as it is."""
        return value.full_tensor() if self.gathers(value) else value

    def is_of(self, value: Any, param: torch.Tensor) -> bool:
        """Whether it is a DTensor of a parameter's own memory."""
        from torch.distributed.tensor import DTensor

        if not isinstance(value, DTensor):
            return False
        here = value.to_local()
        return (here.data_ptr(), here.shape, here.dtype) == (param.data_ptr(), param.shape, param.dtype)

    def held_entries(self, entries: dict[str, dict[str, Entry]]) -> dict[str, dict[str, Entry]]:
        """What layers keep of the heads that are here."""
        return {
            layer: {
                key: dataclasses.replace(one, shape=self.held.shape(one.axes, one.shape)) for key, one in parts.items()
            }
            for layer, parts in entries.items()
        }

    def _gather(self, part: torch.Tensor, cut: Cut, axis: int) -> torch.Tensor:
        for mesh_axis in reversed(axes_of(cut)):  # the first of them is the outermost
            parts = [
                torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.sizes[mesh_axis])
            ]
            places, group = [_bytes(one) for one in parts], self.mesh.get_group(mesh_axis)
            coordinator().finish(dist.all_gather(places, _bytes(part), group=group, async_op=True), part.device.type)
            part = torch.cat(parts, dim=axis)
        return part

    def _cuts(self, name: str) -> tuple[Cut, ...]:
        """Of a matrix that is loaded; a layer's whose weight is none (a tied head's second name) have no cuts."""
        return self.cuts.get(name, (None, None))


def check_mesh(mesh: DeviceMesh) -> tuple[str, ...]:
    """Names of its axes.

    Raises:
        ValueError: it is no mesh, has names without meaning, not all processes, or these in an order torch mixes up.
    """
    if not isinstance(mesh, DeviceMesh):
        kind = type(mesh).__name__
        raise ValueError(f"mesh={mesh!r} is a {kind}, expected a torch.distributed.device_mesh.DeviceMesh, or None")
    names = mesh.mesh_dim_names or ()
    if not names or set(names) - set(MESH_AXES):
        raise ValueError(f"mesh has axes {list(names)}, expected names among {', '.join(MESH_AXES)}")
    if mesh.size() != dist.get_world_size():
        raise ValueError(f"mesh has {mesh.size()} ranks, expected all {dist.get_world_size()} processes")
    for axis, name in enumerate(names):
        if (mesh.mesh.diff(dim=axis) < 0).any():
            raise ValueError(
                f"the ranks of mesh {mesh.mesh.tolist()} do not rise along {name!r}, and torch gathers parts, also of a"
                " DTensor, in the order of ranks. Put them in order, as init_device_mesh does."
            )
    return names


def _side_by_side(parts: list[torch.Tensor], axis: int = 0) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def to_host(parallel: Parallel | None, name: str, part: torch.Tensor) -> np.ndarray:
    """All of a parameter on this host; see ``Parallel.whole``."""
    return host_view((part if parallel is None else parallel.whole(name, part)).cpu().contiguous())
