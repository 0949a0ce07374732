"""Where arrays live on a mesh: one table from axis letters to mesh axes.

Stored layout never depends on the mesh. An axis whose whole units (heads, experts, rows) the mesh axes do not divide
stays whole on every device; ``replicated`` names those parameters.

``data`` cuts rows alone, ``expert`` and ``tensor`` cut weights so that each device multiplies what it holds. ``fsdp``
cuts rows, and weights along the model's width: where they are multiplied the compiler gathers them, or sums parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from loaders.spec import Dim, ParamSpec, dim_of

FSDP = "fsdp"
MESH_AXES = ("data", "expert", "tensor")  # and FSDP, which few meshes have
# Axis letter (docs/glossary.md) -> mesh axes it is cut by, together where they divide it; others stay whole.
# Whatever is no expert is cut by "expert" too: those devices would otherwise hold copies of it.
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "B": ("data", FSDP),
    "D": (FSDP,),
    "V": ("expert", "tensor"),
    "NH": ("expert", "tensor"),
    "N2H": ("expert", "tensor"),
    "KH": ("expert", "tensor"),
    "F": ("expert", "tensor"),
    "SF": ("expert", "tensor"),
    "QKV": ("expert", "tensor"),
    "LV": ("expert", "tensor"),
    "LN": ("expert", "tensor"),
    "M": ("tensor",),
    "E": ("expert",),
}

Cut = str | tuple[str, ...] | None  # one axis of a PartitionSpec


def usable_mesh(mesh: Mesh | None) -> Mesh | None:
    """The same devices under axes whose shardings the compiler propagates, as our programs expect.

    ``jax.make_mesh`` gives axes of type Explicit, where every ambiguous product is an error.

    Raises:
        ValueError: the mesh has an axis we give no meaning.
    """
    if mesh is None:
        return None
    unknown = sorted(set(mesh.axis_names) - {*MESH_AXES, FSDP})
    if unknown:
        raise ValueError(f"mesh has axes {unknown}, expected only {', '.join((*MESH_AXES, FSDP))}")
    return Mesh(mesh.devices, mesh.axis_names)


def cut_of(mesh: Mesh | AbstractMesh, axes: tuple[str, ...], units: int) -> Cut:
    """Those of ``axes`` that cut ``units`` evenly: all that the mesh has, else the last alone, else the first."""
    present = tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
    for choice in (present, present[-1:], present[:1]):
        if choice and units % math.prod(mesh.shape[axis] for axis in choice) == 0:
            return choice[0] if len(choice) == 1 else choice
    return None


def axes_of(cut: Cut) -> tuple[str, ...]:
    """The mesh axes of a cut."""
    return (cut,) if isinstance(cut, str) else cut or ()


def param_spec(spec: ParamSpec, dims: dict[str, Dim], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Mesh axes of every axis of one parameter."""
    return PartitionSpec(
        *(
            cut_of(mesh, axes, dim.units or dim.size) if axes else None
            for dim, axes in zip((dim_of(axis, dims) for axis in spec.axes), _wanted(spec), strict=True)
        )
    )


def _wanted(spec: ParamSpec) -> list[tuple[str, ...]]:
    """The table's mesh axes for every axis. Routers are whole, for they must see all their scores; so are vectors."""
    is_router = spec.axes[:1] == ("E",) and len(spec.axes) <= 2
    letters = [axis.partition("/")[0] for axis in spec.axes]  # codes and block scales are cut as their axis is
    whole = {"E", "D"} if is_router else {"D"} if len(letters) == 1 else set()
    return [() if letter in whole else LOGICAL_AXES.get(letter, ()) for letter in letters]


def gathered(cuts: PartitionSpec) -> tuple[Cut, ...]:
    """The cuts of a weight where it is multiplied: those along the model's width are undone before."""
    return tuple(tuple(by for by in axes_of(cut) if by != FSDP) or None for cut in cuts)


def param_sharding(spec: ParamSpec, dims: dict[str, Dim], mesh: Mesh | None) -> NamedSharding | None:
    """Sharding of one parameter; None without a mesh (the default device)."""
    return None if mesh is None else NamedSharding(mesh, param_spec(spec, dims, mesh))


def entry_sharding(mesh: Mesh | None, shape: tuple[int, ...], axes: tuple[str, ...]) -> NamedSharding | None:
    """Sharding of what a layer keeps: rows as a batch's, heads as the projections cut them; None without a mesh."""
    if mesh is None:
        return None
    wanted = [LOGICAL_AXES.get(axis, ()) for axis in axes]
    return NamedSharding(
        mesh, PartitionSpec(*(cut_of(mesh, by, size) if by else None for by, size in zip(wanted, shape, strict=True)))
    )


def row_sharding(mesh: Mesh | None, rows: int | None) -> NamedSharding | None:
    """Sharding of anything [B, ...] of which only rows are cut; ``rows`` None: not even those."""
    if mesh is None:
        return None
    return NamedSharding(mesh, PartitionSpec(cut_of(mesh, LOGICAL_AXES["B"], rows)) if rows else PartitionSpec())


@dataclass(frozen=True)
class ExpertSpecs:
    """How the expert stacks and the rows they multiply are cut, and over which mesh axes partial results are summed."""

    rows: PartitionSpec
    gate_up: PartitionSpec
    down: PartitionSpec
    summed: tuple[str, ...]
    is_cut: bool  # a device holds only some of the experts


def expert_specs(mesh: Mesh, *, num_experts: int, width: int, rows: int, whole: int = 1) -> ExpertSpecs:
    """Cuts of ``gate_up_proj`` [E, 2, M, D] and ``down_proj`` [E, D, M], as the table above makes them.

    ``whole``: columns of the width that must stay together.
    """
    experts = cut_of(mesh, LOGICAL_AXES["E"], num_experts)
    inner = cut_of(mesh, LOGICAL_AXES["M"], width // whole)
    return ExpertSpecs(
        rows=PartitionSpec(cut_of(mesh, LOGICAL_AXES["B"], rows)),
        gate_up=PartitionSpec(experts, None, inner, None),
        down=PartitionSpec(experts, None, inner),
        summed=(*axes_of(experts), *axes_of(inner)),
        is_cut=experts is not None,
    )


def replicated(params: tuple[ParamSpec, ...], dims: dict[str, Dim], mesh: Mesh | AbstractMesh) -> list[str]:
    """Parameters that every device holds whole although the table would cut them."""
    wanted = {spec.name: any(mesh.shape.get(axis, 1) > 1 for axes in _wanted(spec) for axis in axes) for spec in params}
    return [spec.name for spec in params if wanted[spec.name] and not any(param_spec(spec, dims, mesh))]
