"""The experts of a layer as stacks of 4-bit codes. Twin of the torch file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jax_models.kernels.activations import quantized_activations
from jax_models.kernels.grouped import grouped_matmul
from jax_models.kernels.nvfp4 import nvfp4_grouped_matmul
from jax_models.layers.by_expert import by_expert, of_those_here, weighed
from jax_models.layers.lora import ExpertUpdates
from jax_models.layers.moe import Experts, update_specs
from jax_models.layers.quantized import exact_weight, multiplier
from jax_models.sharding import expert_specs
from jax_models.taps import tap_rows
from loaders.quantization.schemes import BLOCK, Scheme


class NVFP4Experts(nnx.Module):
    """All experts of a layer, ``w13`` [E, 2, M, D] (gate first) and ``w2`` [E, D, M], each with scales of its own.

    Gate and up of one expert may have different global scales: every half of the rows is multiplied by its own alpha.
    """

    path: str = ""

    def __init__(self, plain: Experts, scheme: Scheme, *, quantizes_inputs: bool) -> None:
        E, M, D = plain.num_experts, plain.expert_size, plain.hidden_size
        scalar = (1,) if scheme.divides else ()
        for stack, lead, rows, inner in (("w13", (E, 2), M, D), ("w2", (E,), D, M)):
            shapes = {"codes": (rows, inner // 2), "block": (rows, inner // BLOCK), "global": scalar, "input": scalar}
            dtypes = {"codes": jnp.uint8, "block": jnp.float8_e4m3fn, "global": jnp.float32, "input": jnp.float32}
            for role, leaf in scheme.leaves.items():
                setattr(self, f"{stack}_{leaf}", nnx.Param(jnp.zeros((*lead, *shapes[role]), dtypes[role])))
        self.scheme, self.mesh = scheme, plain.mesh
        self.quantizes_inputs = scheme.activations and quantizes_inputs

    def source(self, stack: str, role: str) -> jax.Array:
        """A tensor of the checkpoint, of stack ``w13`` or ``w2``."""
        return getattr(self, f"{stack}_{self.scheme.leaves[role]}")[...]

    def dequantized(self, stack: str) -> jax.Array:
        """The weights of a stack, float32, with the roundings of the exporter's own definition."""
        scale = self._scalars(stack, "global", as_stored=True)[..., None, None]
        return exact_weight(self.source(stack, "codes"), self.source(stack, "block"), scale, self.scheme)

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
        stacks = [self.source(stack, role) for stack in ("w13", "w2") for role in ("codes", "block")]
        scalars = [self._scalars(stack, "global") for stack in ("w13", "w2")]
        inputs = [self._scalars(stack, "input") for stack in ("w13", "w2")] if self.quantizes_inputs else []
        given = (x_BTD, weights_BTX, experts_BTX)
        if self.mesh is None:
            out_BTD = _chosen(updates, *given, *stacks, *scalars, *inputs, first=jnp.int32(0), path=self.path)
            return out_BTD.astype(x_BTD.dtype)
        E, _, M, _ = stacks[0].shape
        # a device's part of the width must be whole blocks of the second product's inputs
        specs = expert_specs(self.mesh, num_experts=E, width=M, rows=x_BTD.shape[0], whole=BLOCK)

        def local(updates: ExpertUpdates | None, *args: jax.Array) -> jax.Array:
            first = jax.lax.axis_index("expert") * len(args[3]) if specs.is_cut else jnp.int32(0)
            out = _chosen(updates, *args, first=first, parts=E // len(args[3]))
            return jax.lax.psum(out, specs.summed) if specs.summed else out

        by_stack = (specs.gate_up, specs.gate_up, specs.down, specs.down)
        of_experts = jax.sharding.PartitionSpec(specs.gate_up[0])
        by_update = (update_specs(specs, updates),)
        in_specs = (by_update, (specs.rows,) * 3, by_stack, (of_experts,) * (len(scalars) + len(inputs)))
        run = partial(jax.shard_map, mesh=self.mesh, check_vma=False)(
            local, in_specs=sum(in_specs, ()), out_specs=specs.rows
        )
        return run(updates, *given, *stacks, *scalars, *inputs).astype(x_BTD.dtype)

    def _scalars(self, stack: str, role: str, *, as_stored: bool = False) -> jax.Array:
        """Global scales, [E, 2] or [E], as multipliers unless they are wanted as stored."""
        scale = self.source(stack, role)
        scale = scale[..., 0] if self.scheme.divides else scale
        return scale if as_stored else multiplier(scale, self.scheme)


def _chosen(
    updates: ExpertUpdates | None,
    x_BTD: jax.Array,
    weights_BTX: jax.Array,
    experts_BTX: jax.Array,
    *stacks: jax.Array,
    first: jax.Array,
    path: str | None = None,
    parts: int = 1,
) -> jax.Array:
    """The part of the weighted sum that experts ``first`` .. ``first + E - 1`` contribute, float32 [B, T, D].

    ``path``: for taps; None on a mesh, where a device sees its part alone. ``parts``: of as many this is one.
    """
    E = len(stacks[0])
    group_A, order_A, size_E = by_expert(experts_BTX, first, E)

    def summed(rows: jax.Array) -> jax.Array:
        out = _products(updates, path, x_BTD, rows, group_A.reshape(experts_BTX.shape), size_E, *stacks)
        return weighed(out, order_A, group_A < E, weights_BTX)

    return of_those_here(summed, order_A, size_E, x_BTD, parts)


def _products(
    updates: ExpertUpdates | None,
    path: str | None,
    x_BTD: jax.Array,
    order_A: jax.Array,
    group_BTX: jax.Array,
    size_E: jax.Array,
    w13_E2MJ: jax.Array,
    w13_scale_E2MQ: jax.Array,
    w2: jax.Array,
    w2_scale: jax.Array,
    w13_scale_2_E2: jax.Array,
    w2_scale_2_E: jax.Array,
    w13_input_scale_E2: jax.Array | None = None,
    w2_input_scale_E: jax.Array | None = None,
) -> jax.Array:
    """What experts make of the choices that they are given, dtype of x [A, D]; ``w2``: [E, D, M/2]."""
    E, _, M, _ = w13_E2MJ.shape
    lead, x_UD = group_BTX.shape, x_BTD.reshape(-1, x_BTD.shape[-1])
    token_A = order_A // lead[-1]
    # as of experts in bfloat16: what an adapter adds to is not rounded yet
    product = partial(nvfp4_grouped_matmul, dtype=x_BTD.dtype if updates is None else jnp.float32)
    if w13_input_scale_E2 is None or w2_input_scale_E is None:
        g1_alphas_E2, g2_alphas_E = w13_scale_2_E2, w2_scale_2_E
        codes_EFJ, scale_EFQ = (x.reshape(E, 2 * M, -1) for x in (w13_E2MJ, w13_scale_E2MQ))
        gate_up_AF = product(x_UD, codes_EFJ, scale_EFQ, g1_alphas_E2, size_E, token_A)
    else:
        g1_alphas_E2, g2_alphas_E = w13_input_scale_E2 * w13_scale_2_E2, w2_input_scale_E * w2_scale_2_E
        given = (w13_E2MJ, w13_scale_E2MQ, w13_input_scale_E2, g1_alphas_E2)
        gate_up_AF = _halves(product, x_UD, order_A, group_BTX, *given)
    by_group = partial(grouped_matmul, sizes=size_E)
    if updates is not None:
        gate_up_AF = updates.first(gate_up_AF, x_UD[token_A], by_group, updates.slots(order_A, lead))
    gate_AM, up_AM = jnp.split(gate_up_AF.astype(x_BTD.dtype), 2, axis=-1)
    gate_AM = tap_rows(path, "gate_proj", gate_AM, order_A, lead)
    up_AM = tap_rows(path, "up_proj", up_AM, order_A, lead)
    hidden_AM = tap_rows(path, "product", jax.nn.silu(gate_AM) * up_AM, order_A, lead)
    inner_AM = hidden_AM
    if w2_input_scale_E is not None:
        owner_A = jnp.minimum(group_BTX.reshape(-1)[order_A], E - 1)
        inner_AM = quantized_activations(hidden_AM, w2_input_scale_E[owner_A][:, None])
    out_AD = product(inner_AM, w2, w2_scale, g2_alphas_E[:, None], size_E)
    if updates is not None:
        out_AD = updates.second(out_AD, hidden_AM, by_group, updates.slots(order_A, lead))
    return tap_rows(path, "down_proj", out_AD.astype(x_BTD.dtype), order_A, lead)


def _halves(
    product: Callable[..., jax.Array],
    x_UD: jax.Array,
    order_A: jax.Array,
    group_BTX: jax.Array,
    w13_E2MJ: jax.Array,
    w13_scale_E2MQ: jax.Array,
    input_scale_E2: jax.Array,
    alphas_E2: jax.Array,
) -> jax.Array:
    """Gate and up of the choices given, with their inputs quantised, [A, 2M]; groups from E on come out as anything.

    Gate and up may have different input scales, and so see different codes: each is an expert of its own here, for a
    slice of the stacks would be a copy of all of them at every step.
    """
    (E, _, M, _), A, X = w13_E2MJ.shape, len(order_A), group_BTX.shape[-1]
    half, order, size_F = by_expert(group_BTX[..., None] * 2 + jnp.arange(2), 0, 2 * E)
    order_C = order[: 2 * A]
    owner_C = jnp.minimum(half[order_C], 2 * E - 1)
    rows_CD = quantized_activations(x_UD[order_C // (2 * X)], input_scale_E2.reshape(-1)[owner_C][:, None])
    codes, scale = (x.reshape(2 * E, M, -1) for x in (w13_E2MJ, w13_scale_E2MQ))
    out_CM = product(rows_CD, codes, scale, alphas_E2.reshape(-1, 1), size_F)
    place_A2 = jnp.minimum(jnp.argsort(order).reshape(-1, 2)[order_A], 2 * A - 1)
    return out_CM[place_A2].reshape(A, 2 * M)
