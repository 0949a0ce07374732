"""Where arrays live on a mesh, by the table of ``loaders.axes``."""

from __future__ import annotations

from dataclasses import dataclass

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jax_models.processes import agreed, check_here
from loaders.axes import FSDP, LOGICAL_AXES, axes_of, cut_of, param_cuts
from loaders.spec import Dim, ParamSpec

MESH_AXES = ("data", "expert", "tensor")  # and FSDP, which few meshes have


def usable_mesh(mesh: Mesh | None) -> Mesh | None:
    """The same devices under axes whose shardings the compiler propagates, as our programs expect.

    ``jax.make_mesh`` gives axes of type Explicit, where every ambiguous product is an error. All processes of the mesh
    have to call this, with the same axes over the same devices.

    Raises:
        ValueError: it is no mesh of devices, has none of this process, an axis we give no meaning, or other axes than
            on another process.
        RuntimeError: so it is on another process only.
    """
    if mesh is None:
        return None
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh={mesh!r} is a {type(mesh).__name__}, expected a jax.sharding.Mesh of devices, or None")
    if not mesh.size:
        raise ValueError("the mesh has no device")
    if len(set(mesh.devices.flat)) < mesh.size:
        raise ValueError(
            f"the mesh has {mesh.size} places for {len(set(mesh.devices.flat))} devices, expected each once"
        )

    def checked() -> Mesh:
        unknown = sorted(set(mesh.axis_names) - {*MESH_AXES, FSDP})
        if unknown:
            raise ValueError(f"mesh has axes {unknown}, expected only {', '.join((*MESH_AXES, FSDP))}")
        return Mesh(mesh.devices, mesh.axis_names)

    check_here(mesh)  # who has no part of it is not waited for

    def said(found: Mesh) -> str:
        return f"{dict(found.shape)} of devices {[device.id for device in found.devices.flat]}"

    return agreed(mesh, "the mesh", checked, said)


def param_spec(spec: ParamSpec, dims: dict[str, Dim], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Mesh axes of every axis of one parameter."""
    return PartitionSpec(*param_cuts(spec, dims, mesh.shape))


def param_sharding(spec: ParamSpec, dims: dict[str, Dim], mesh: Mesh | None) -> NamedSharding | None:
    """Sharding of one parameter; None without a mesh (the default device)."""
    return None if mesh is None else NamedSharding(mesh, param_spec(spec, dims, mesh))


def entry_sharding(mesh: Mesh | None, shape: tuple[int, ...], axes: tuple[str, ...]) -> NamedSharding | None:
    """Sharding of what a layer keeps: rows as a batch's, heads as the projections cut them; None without a mesh."""
    if mesh is None:
        return None
    wanted = [LOGICAL_AXES.get(axis, ()) for axis in axes]
    return NamedSharding(
        mesh,
        PartitionSpec(*(cut_of(mesh.shape, by, size) if by else None for by, size in zip(wanted, shape, strict=True))),
    )


def row_sharding(mesh: Mesh | None, rows: int | None) -> NamedSharding | None:
    """Sharding of anything [B, ...] of which only rows are cut; ``rows`` None: not even those."""
    if mesh is None:
        return None
    return NamedSharding(mesh, PartitionSpec(cut_of(mesh.shape, LOGICAL_AXES["B"], rows)) if rows else PartitionSpec())


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
    experts = cut_of(mesh.shape, LOGICAL_AXES["E"], num_experts)
    inner = cut_of(mesh.shape, LOGICAL_AXES["M"], width // whole)
    return ExpertSpecs(
        rows=PartitionSpec(cut_of(mesh.shape, LOGICAL_AXES["B"], rows)),
        gate_up=PartitionSpec(experts, None, inner, None),
        down=PartitionSpec(experts, None, inner),
        summed=(*axes_of(experts), *axes_of(inner)),
        is_cut=experts is not None,
    )
