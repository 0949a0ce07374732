"""Where arrays live on a mesh: one table from axis letters to mesh axes.

Stored layout never depends on the mesh. An axis whose whole units (heads, experts, rows) the mesh axis does not divide
stays whole on every device; ``replicated`` names those parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from loaders.spec import Dim, ParamSpec

MESH_AXES = ("data", "expert", "tensor")
# axis letter (docs/glossary.md) -> mesh axis; letters not listed stay whole
LOGICAL_AXES = {"V": "tensor", "NH": "tensor", "KH": "tensor", "F": "tensor", "M": "tensor", "E": "expert"}


def check_mesh(mesh: Mesh | None) -> None:
    """Raises ValueError when the mesh has an axis we give no meaning."""
    unknown = sorted(set(mesh.axis_names) - set(MESH_AXES)) if mesh is not None else []
    if unknown:
        raise ValueError(f"mesh has axes {unknown}, expected only {', '.join(MESH_AXES)}")


def divides(mesh: Mesh, axis: str, units: int) -> bool:
    """Whether ``mesh`` has ``axis`` and cuts ``units`` evenly with it."""
    return axis in mesh.axis_names and units % mesh.shape[axis] == 0


def param_spec(spec: ParamSpec, dims: dict[str, Dim], mesh: Mesh) -> PartitionSpec:
    """Mesh axis of every axis of one parameter."""
    cuts = []
    for letter in spec.axes:
        axis = LOGICAL_AXES.get(letter)
        cuts.append(axis if axis and divides(mesh, axis, dims[letter].units or dims[letter].size) else None)
    return PartitionSpec(*cuts)


def param_sharding(spec: ParamSpec, dims: dict[str, Dim], mesh: Mesh | None) -> NamedSharding | None:
    """Sharding of one parameter; None without a mesh (the default device)."""
    return None if mesh is None else NamedSharding(mesh, param_spec(spec, dims, mesh))


def cache_sharding(mesh: Mesh | None, rows: int, num_key_value_heads: int) -> NamedSharding | None:
    """Sharding of keys and values [B, S, K, H]; None without a mesh."""
    if mesh is None:
        return None
    batch = "data" if divides(mesh, "data", rows) else None
    heads = "tensor" if divides(mesh, "tensor", num_key_value_heads) else None
    return NamedSharding(mesh, PartitionSpec(batch, None, heads, None))


def row_sharding(mesh: Mesh | None, rows: int | None) -> NamedSharding | None:
    """Sharding of anything [B, ...] that only its rows are cut of; ``rows`` None: not even those."""
    if mesh is None:
        return None
    return NamedSharding(mesh, PartitionSpec("data") if rows and divides(mesh, "data", rows) else PartitionSpec())


@dataclass(frozen=True)
class ExpertSpecs:
    """How the expert stacks are cut, and over which mesh axes their partial results are summed."""

    experts: bool
    gate_up: PartitionSpec
    down: PartitionSpec
    summed: tuple[str, ...]


def expert_specs(mesh: Mesh, *, num_experts: int, width: int) -> ExpertSpecs:
    """Cuts of ``gate_up_proj`` [E, 2, M, D] and ``down_proj`` [E, D, M], as the table above makes them."""
    experts = "expert" if divides(mesh, "expert", num_experts) else None
    inner = "tensor" if divides(mesh, "tensor", width) else None
    summed = tuple(axis for axis in (experts, inner) if axis)
    return ExpertSpecs(
        experts is not None, PartitionSpec(experts, None, inner, None), PartitionSpec(experts, None, inner), summed
    )


def replicated(params: tuple[ParamSpec, ...], dims: dict[str, Dim], mesh: Mesh) -> list[str]:
    """Parameters that every device holds whole although the table would cut them."""
    cut = {
        spec.name: [letter for letter in spec.axes if LOGICAL_AXES.get(letter) in mesh.axis_names] for spec in params
    }
    return [spec.name for spec in params if cut[spec.name] and not any(param_spec(spec, dims, mesh))]
