"""NVFP4 products on a mesh: the kernels multiply what one device holds, so the cuts are made explicit here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
from jax.sharding import Mesh, PartitionSpec

from jax_models.kernels.nvfp4 import nvfp4_matmul
from loaders.axes import LOGICAL_AXES, Cut, axes_of, cut_of


@dataclass(frozen=True)
class Cuts:
    """How a weight [N, K] lies on a mesh: what cuts its outputs and its inputs when multiplied. No mesh: nothing."""

    mesh: Mesh | None
    outputs: Cut = None
    inputs: Cut = None


def matmul(x: jax.Array, codes_NJ: jax.Array, scale_NQ: jax.Array, cuts: Cuts) -> jax.Array:
    """x [..., K] times the transposed weight, without global scales: float32 [..., N]."""
    leading = x.shape[:-1]
    if cuts.mesh is None:
        return nvfp4_matmul(x.reshape(-1, x.shape[-1]), codes_NJ, scale_NQ).reshape(*leading, -1)
    rows = cut_of(cuts.mesh.shape, LOGICAL_AXES["B"], leading[0])
    between = (None,) * (len(leading) - 1)
    weight = PartitionSpec(cuts.outputs, cuts.inputs)

    def local(x: jax.Array, codes_NJ: jax.Array, scale_NQ: jax.Array) -> jax.Array:
        y = nvfp4_matmul(x.reshape(-1, x.shape[-1]), codes_NJ, scale_NQ).reshape(*x.shape[:-1], -1)
        return jax.lax.psum(y, axes_of(cuts.inputs)) if cuts.inputs else y

    shared = partial(jax.shard_map, mesh=cuts.mesh, check_vma=False)
    run = shared(
        local,
        in_specs=(PartitionSpec(rows, *between, cuts.inputs), weight, weight),
        out_specs=PartitionSpec(rows, *between, cuts.outputs),
    )
    return run(x, codes_NJ, scale_NQ)
