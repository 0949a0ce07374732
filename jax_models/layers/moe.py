"""Mixture of experts: a router, and experts as stacks multiplied group by group."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jax_models.kernels.grouped import grouped_matmul
from jax_models.layers.by_expert import by_expert, of_those_here, weighed
from jax_models.layers.lora import ExpertUpdates, Stacks
from jax_models.sharding import ExpertSpecs, expert_specs
from jax_models.taps import tap, tap_rows


class TopKRouter(nnx.Module):
    """Softmax over all experts, then the best ``top_k``; ties go to the lower index.

    Logits stay float32 whatever the dtype of x. Source: transformers ``Qwen3MoeTopKRouter``.
    """

    path: str = ""

    def __init__(self, hidden_size: int, num_experts: int, *, top_k: int, norm_topk_prob: bool) -> None:
        self.weight = nnx.Param(jnp.zeros((num_experts, hidden_size)))
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights, float32 [B, T, X], and experts, int32 [B, T, X], by falling weight."""
        return self.choose(tap(self.path, "logits", self.logits(x_BTD), "modules"))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """A score for every expert, float32 [B, T, E]."""
        weight_ED = self.weight[...].astype(x_BTD.dtype)
        return jnp.einsum("btd,ed->bte", x_BTD, weight_ED, preferred_element_type=jnp.float32)

    def choose(self, logits_BTE: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The experts of the best scores, and their weights."""
        weights_BTX, experts_BTX = jax.lax.top_k(jax.nn.softmax(logits_BTE, axis=-1), self.top_k)
        if self.norm_topk_prob:
            weights_BTX = weights_BTX / jnp.sum(weights_BTX, axis=-1, keepdims=True)
        return weights_BTX, experts_BTX

    def weigh(self, logits_BTE: jax.Array, experts_BTX: jax.Array) -> jax.Array:
        """What the scores say of experts that were chosen elsewhere: weights as ``choose`` gives them."""
        weights_BTX = jnp.take_along_axis(jax.nn.softmax(logits_BTE, axis=-1), experts_BTX, axis=-1)
        return weights_BTX / jnp.sum(weights_BTX, axis=-1, keepdims=True) if self.norm_topk_prob else weights_BTX


def routed(gate: Any, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights and experts, [B, T, X], of a router; where experts were handed in from elsewhere, these and its weights.

    ``gate``: a ``TopKRouter``, or what stands in its place.
    """
    weights_BTX, experts_BTX = gate(x_BTD)
    given_BTX = tap(gate.path, "", experts_BTX, "layers")
    if given_BTX is not experts_BTX:
        weights_BTX = gate.weigh(tap(gate.path, "logits", gate.logits(x_BTD), "modules"), given_BTX)
    return tap(gate.path, "weights", weights_BTX, "modules"), given_BTX


class Experts(nnx.Module):
    """All experts of a layer: ``gate_up_proj`` [E, 2, M, D] (gate first) and ``down_proj`` [E, D, M]."""

    path: str = ""

    def __init__(self, hidden_size: int, num_experts: int, expert_size: int, mesh: Mesh | None) -> None:
        self.hidden_size, self.num_experts, self.expert_size = hidden_size, num_experts, expert_size
        self.gate_up_proj = nnx.Param(jnp.zeros((num_experts, 2, expert_size, hidden_size)))
        self.down_proj = nnx.Param(jnp.zeros((num_experts, hidden_size, expert_size)))
        self.mesh = mesh

    def __call__(
        self,
        x_BTD: jax.Array,
        weights_BTX: jax.Array,
        experts_BTX: jax.Array,
        updates: ExpertUpdates | None = None,
    ) -> jax.Array:
        """Weighted sum of the chosen experts, in float32, returned in the dtype of x.

        ``updates``: what adapters add to both products, before they are rounded.
        """
        gate_up, down = self.gate_up_proj[...].astype(x_BTD.dtype), self.down_proj[...].astype(x_BTD.dtype)
        if self.mesh is None:
            given = (x_BTD, weights_BTX, experts_BTX, gate_up, down)
            return _chosen(*given, jnp.int32(0), updates, self.path).astype(x_BTD.dtype)
        return self._sharded(x_BTD, weights_BTX, experts_BTX, gate_up, down, updates)

    def _sharded(
        self,
        x_BTD: jax.Array,
        weights_BTX: jax.Array,
        experts_BTX: jax.Array,
        gate_up: jax.Array,
        down: jax.Array,
        updates: ExpertUpdates | None,
    ) -> jax.Array:
        """Each device multiplies the experts, and the part of their width, that it holds; one sum joins them."""
        assert self.mesh is not None
        E, _, M, _ = gate_up.shape
        specs = expert_specs(self.mesh, num_experts=E, width=M, rows=x_BTD.shape[0])

        def local(
            x: jax.Array,
            weights: jax.Array,
            experts: jax.Array,
            gate_up: jax.Array,
            down: jax.Array,
            updates: ExpertUpdates | None,
        ) -> jax.Array:
            first = jax.lax.axis_index("expert") * len(gate_up) if specs.is_cut else jnp.int32(0)
            out = _chosen(x, weights, experts, gate_up, down, first, updates, parts=E // len(gate_up))
            return jax.lax.psum(out, specs.summed) if specs.summed else out

        shared = partial(jax.shard_map, mesh=self.mesh, check_vma=False)
        in_specs = ((specs.rows,) * 3, (specs.gate_up, specs.down, update_specs(specs, updates)))
        run = shared(local, in_specs=sum(in_specs, ()), out_specs=specs.rows)
        return run(x_BTD, weights_BTX, experts_BTX, gate_up, down, updates).astype(x_BTD.dtype)


def update_specs(specs: ExpertSpecs, updates: ExpertUpdates | None) -> Any:
    """How the updates of experts are cut: as the stacks they are of."""
    if updates is None:
        return None
    experts, _, inner, _ = specs.gate_up
    whole = PartitionSpec()
    gate_up = Stacks(PartitionSpec(None, experts), PartitionSpec(None, experts, None, inner), whole)  # pyright: ignore[reportArgumentType]
    down = Stacks(PartitionSpec(None, experts, None, inner), PartitionSpec(None, experts), whole)  # pyright: ignore[reportArgumentType]
    return ExpertUpdates(
        None if updates.gate_up is None else gate_up,
        None if updates.down is None else down,
        specs.rows,  # pyright: ignore[reportArgumentType]
    )


def _chosen(
    x_BTD: jax.Array,
    weights_BTX: jax.Array,
    experts_BTX: jax.Array,
    gate_up_E2MD: jax.Array,
    down_EDM: jax.Array,
    first: jax.Array,
    updates: ExpertUpdates | None = None,
    path: str | None = None,
    parts: int = 1,
) -> jax.Array:
    """The part of the weighted sum that experts ``first`` .. ``first + E - 1`` contribute, float32 [B, T, D].

    ``path``: for taps; None on a mesh, where a device sees its part alone. ``parts``: of as many this is one.
    """
    E = len(gate_up_E2MD)
    group_A, order_A, size_E = by_expert(experts_BTX, first, E)
    products = partial(_products, x_BTD, experts_BTX.shape, gate_up_E2MD, down_EDM, size_E, updates, path)

    def summed(rows: jax.Array) -> jax.Array:
        return weighed(products(rows), order_A, group_A < E, weights_BTX)

    return of_those_here(summed, order_A, size_E, x_BTD, parts)


def _products(
    x_BTD: jax.Array,
    lead: tuple[int, ...],
    gate_up_E2MD: jax.Array,
    down_EDM: jax.Array,
    size_E: jax.Array,
    updates: ExpertUpdates | None,
    path: str | None,
    order_A: jax.Array,
) -> jax.Array:
    """What experts make of the choices that they are given, dtype of x [A, D]; ``lead``: [B, T, X]."""
    E, _, M, D = gate_up_E2MD.shape
    rows_AD = x_BTD.reshape(-1, D)[order_A // lead[-1]]
    by_group = partial(grouped_matmul, sizes=size_E)
    # what an adapter adds to is not rounded yet; else nobody reads more than the rounded rows, and prefill has many
    dtype = x_BTD.dtype if updates is None else jnp.float32
    gate_up_AF = by_group(rows_AD, gate_up_E2MD.reshape(E, 2 * M, D), dtype=dtype)
    if updates is not None:
        gate_up_AF = updates.first(gate_up_AF, rows_AD, by_group, updates.slots(order_A, lead))
    gate_AM, up_AM = jnp.split(gate_up_AF.astype(x_BTD.dtype), 2, axis=-1)
    gate_AM = tap_rows(path, "gate_proj", gate_AM, order_A, lead)
    up_AM = tap_rows(path, "up_proj", up_AM, order_A, lead)
    hidden_AM = tap_rows(path, "product", jax.nn.silu(gate_AM) * up_AM, order_A, lead)
    out_AD = by_group(hidden_AM, down_EDM, dtype=dtype)
    if updates is not None:
        out_AD = updates.second(out_AD, hidden_AM, by_group, updates.slots(order_A, lead))
    return tap_rows(path, "down_proj", out_AD.astype(x_BTD.dtype), order_A, lead)


class SparseMoeBlock(nnx.Module):
    """Router and experts. Source: transformers ``Qwen3MoeSparseMoeBlock``."""

    path: str = ""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int,
        expert_size: int,
        top_k: int,
        norm_topk_prob: bool,
        mesh: Mesh | None,
    ) -> None:
        self.gate = TopKRouter(hidden_size, num_experts, top_k=top_k, norm_topk_prob=norm_topk_prob)
        self.experts = Experts(hidden_size, num_experts, expert_size, mesh)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        weights_BTX, experts_BTX = routed(self.gate, x_BTD)
        return tap(self.path, "experts", self.experts(x_BTD, weights_BTX, experts_BTX), "modules")
