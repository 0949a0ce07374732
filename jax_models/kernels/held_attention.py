"""Attention of a few tokens over a cache on TPUs: of the cache only blocks that a row sees anything in are read.

XLA reads every slot that a cache has room for, filled or not, and for windows all before them. JAX's own kernels for
this (``paged_attention``, ``ragged_paged_attention``) see all that a row holds from its first slot on: rows padded on
the left, and slots that speculation leaves empty, are not said to them, nor do they give sums that own tokens could
be added to.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from jax_models.kernels.heads import LANES, are_left_to_xla, cuts_of
from loaders.axes import axes_of

Ref = Any  # what Pallas hands to a kernel: memory, read and written by index
Index = Any  # known when the kernel runs

LEAST_SLOTS = 512  # of fewer there is little to leave out
MOST_TOKENS = 8  # more are a prompt's, whose scores would not stay in registers
_BLOCK_BYTES = 2**20  # of keys and as much of values, of which VMEM holds two
_SCORE_BYTES = 2**22  # of one head of keys, float32, of which there are a few in VMEM
_SUBLANES = 8
_LEAST = float(jnp.finfo(jnp.float32).min)
_NT = (((1,), (1,)), ((), ()))  # both contract their second axis


def takes(q_BTNH: jax.Array, k_BKSH: jax.Array, mesh: Mesh | None) -> bool:
    """Whether the kernel is for queries [B, T, N, H] over this cache: few tokens, many slots, bfloat16, whole lanes."""
    if are_left_to_xla() or q_BTNH.dtype != jnp.bfloat16 or k_BKSH.dtype != jnp.bfloat16:
        return False
    (B, T, N, H), (_, K, S, _) = q_BTNH.shape, k_BKSH.shape
    if T > MOST_TOKENS or S < LEAST_SLOTS or H % LANES:
        return False
    cuts = cuts_of(mesh, B, N, K)
    parts = math.prod(mesh.shape[axis] for axis in axes_of(cuts.by_query)) if mesh else 1
    if cuts.inner and cuts.group % (N // parts):
        return False  # of keys that devices share each would ask for several
    num_keys = 1 if cuts.inner else K // parts
    queries = T * _padded(cuts.group)
    in_vmem = _block_of(S, num_keys * H * 2, queries) * num_keys * H * 2, num_keys * queries * H * 4
    return max(in_vmem) <= _BLOCK_BYTES  # a block and what comes out of a row


@functools.partial(jax.jit, static_argnames=("scale", "softcap", "mesh", "interpret"))  # one trace for all layers
def attend_held(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    visible_BTS: jax.Array,
    start: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    mesh: Mesh | None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """softmax(scale · q kᵀ) v over what is held, float32 [B, T, N, H], and the logarithm of its sum, float32 [B, T, N].

    Where a query sees nothing that is held, the sum's logarithm is near the least float32 and the rest is finite.

    Args:
        q_BTNH: queries; see ``takes``.
        k_BKSH: keys held, each for N/K query heads in a row.
        v_BKSH: values.
        visible_BTS: bool, which slots each query may see.
        start: int32 [], slots filled; what lies in others is not looked at.
        scale: of scores.
        softcap: see ``jax_models.layers.attention.attend``.
        mesh: devices that heads and rows are cut over, as the table of ``loaders.axes`` has it.
        interpret: run on any device, slowly.
    """
    run = functools.partial(_attend, scale=scale, softcap=softcap, interpret=interpret)
    if mesh is None:
        return run(q_BTNH, k_BKSH, v_BKSH, visible_BTS, start)
    cuts = cuts_of(mesh, q_BTNH.shape[0], q_BTNH.shape[2], k_BKSH.shape[1])

    def local(
        q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, start: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        if not cuts.inner:
            return run(q, k, v, seen, start)
        return run(q, k, v, seen, start, jax.lax.axis_index(cuts.inner) * q.shape[2] // cuts.group)

    of_queries, of_keys = PartitionSpec(cuts.rows, None, cuts.by_query), PartitionSpec(cuts.rows, cuts.by_key)
    in_specs = (of_queries, of_keys, of_keys, PartitionSpec(cuts.rows), PartitionSpec())
    out_specs = (of_queries, of_queries)
    shared = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return shared(q_BTNH, k_BKSH, v_BKSH, visible_BTS, start)


def _attend(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    visible_BTS: jax.Array,
    start: jax.Array,
    asked: jax.Array | None = None,
    *,
    scale: float,
    softcap: float | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """On one device. ``asked``: the one head of keys that all queries are for; None: all are asked for."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BKSH.shape[2], k_BKSH.shape[1] if asked is None else 1
    G = _padded(N // K)
    block = _block_of(S, K * H * k_BKSH.dtype.itemsize, T * G)
    is_held_BTS = visible_BTS & (jnp.arange(S) < start)
    # the first block of each row. Steps are counted from the cache's start and not from the first of all rows, so that
    # their number is of scalars alone: one that an array is made of lies in HBM, and any array there makes libtpu give
    # 16 KiB to each tuple of the program
    first_B = jnp.argmax(is_held_BTS.any(axis=1), axis=1).astype(jnp.int32) // block
    num_steps = jax.lax.div(jnp.maximum(start, 1).astype(jnp.int32) + (block - 1), jnp.int32(block))
    places = first_B if asked is None else jnp.append(first_B, asked)

    q_BTKGH = jnp.pad(q_BTNH.reshape(B, T, K, -1, H), ((0, 0), (0, 0), (0, 0), (0, G - N // K), (0, 0)))
    q_BKRH = q_BTKGH.transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    seen_BTS = is_held_BTS.astype(jnp.float32)

    def row_at(row: Index, step: Index, *_: Ref) -> tuple[Index, ...]:
        return row, 0, 0, 0

    def held_at(row: Index, step: Index, places: Ref) -> tuple[Index, ...]:
        return row, 0 if asked is None else places[B], _fetched(row, step, places), 0

    def seen_at(row: Index, step: Index, places: Ref) -> tuple[Index, ...]:
        return row, 0, _fetched(row, step, places)

    held = pl.BlockSpec((None, K, block, H), held_at)
    of_row = [pl.BlockSpec((None, K, T * G, width), row_at) for width in (H, H, LANES)]
    out_BKRH, sum_BKRL = pl.pallas_call(
        functools.partial(_kernel, num_slots=S, scale=scale, softcap=softcap),
        out_shape=[jax.ShapeDtypeStruct((B, K, T * G, width), jnp.float32) for width in (H, LANES)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, num_steps),
            in_specs=[of_row[0], held, held, pl.BlockSpec((None, T, block), seen_at)],
            out_specs=of_row[1:],
            scratch_shapes=[pltpu.VMEM((K, T * G, LANES), jnp.float32)],
        ),
        cost_estimate=_cost(B, K, T * G, S, H),
        interpret=interpret,
        name="attend_held",
    )(places, q_BKRH, k_BKSH, v_BKSH, seen_BTS)

    def by_query(x_BKRW: jax.Array) -> jax.Array:
        return x_BKRW.reshape(B, K, T, G, -1).transpose(0, 2, 1, 3, 4)[:, :, :, : N // K].reshape(B, T, N, -1)

    return by_query(out_BKRH), by_query(sum_BKRL[..., :1])[..., 0]


def _padded(group: int) -> int:
    """Rows for a token's queries of one key, which fill whole sublanes."""
    return pl.cdiv(group, _SUBLANES) * _SUBLANES


def _block_of(num_slots: int, slot_bytes: int, queries: int) -> int:
    """Slots of a block: what there is room for, but whole lanes; the last block may reach beyond the cache."""
    room = min(_BLOCK_BYTES // slot_bytes, _SCORE_BYTES // (4 * queries))
    most = max(LANES, room // LANES * LANES)
    return min(most, pl.cdiv(num_slots, LANES) * LANES)


def _fetched(row: Index, step: Index, places: Ref) -> Index:
    """The block that is in VMEM at a step: until the row's first it is that one, and the same is fetched once."""
    return jnp.maximum(places[row], step)


def _cost(B: int, K: int, R: int, S: int, H: int) -> pl.CostEstimate:
    """Of a full cache: how much of it is seen is not known here."""
    moved = 4 * B * K * S * H + B * K * R * (6 * H + 4 * LANES)
    return pl.CostEstimate(flops=4 * B * K * R * S * H, bytes_accessed=moved, transcendentals=B * K * R * S)


def _kernel(
    places: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    seen: Ref,
    out: Ref,
    sums: Ref,
    top: Ref,
    *,
    num_slots: int,
    scale: float,
    softcap: float | None,
) -> None:
    """One block of one row, all heads. ``out`` and ``sums`` stay in VMEM until the row's last, where they are divided.

    Refs: ``places``, each row's first block with something seen; ``q`` [K, R, H], of every token G queries; ``k`` and
    ``v`` [K, block, H]; ``seen`` [T, block], 0 or 1; ``out`` [K, R, H]; ``sums`` and ``top``, the largest score so far,
    [K, R, 128], the same in every lane.
    """
    row, step = pl.program_id(0), pl.program_id(1)
    (K, R, _), block, T = q.shape, k.shape[1], seen.shape[0]

    @pl.when(step == 0)
    def _start() -> None:
        out[...] = jnp.zeros_like(out)
        sums[...] = jnp.zeros_like(sums)
        top[...] = jnp.full_like(top, _LEAST)

    @pl.when(step == _fetched(row, step, places))  # what is fetched is added once, and nothing else is
    def _add() -> None:
        at = step * block
        is_inside_1S = at + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1) < num_slots
        is_inside_S1 = at + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0) < num_slots
        seen_TS = jnp.where(is_inside_1S, seen[...], 0)  # behind the cache is anything, as in values
        seen_RS = jnp.concatenate([jnp.broadcast_to(seen_TS[t : t + 1], (R // T, block)) for t in range(T)], axis=0)
        for head in range(K):
            scores_RS = scale * jax.lax.dot_general(q[head], k[head], _NT, preferred_element_type=jnp.float32)
            if softcap is not None:
                scores_RS = softcap * jnp.tanh(scores_RS / softcap)
            scores_RS = jnp.where(seen_RS > 0, scores_RS, _LEAST)
            before_R1 = top[head][:, :1]
            top_R1 = jnp.maximum(before_R1, scores_RS.max(axis=1, keepdims=True))
            exp_RS, kept_R1 = jnp.exp(scores_RS - top_R1), jnp.exp(before_R1 - top_R1)
            values = jnp.where(is_inside_S1, v[head], 0)
            mixed_RH = jnp.dot(exp_RS.astype(v.dtype), values, preferred_element_type=jnp.float32)
            out[head] = out[head] * kept_R1 + mixed_RH
            sums[head] = sums[head] * kept_R1 + exp_RS.sum(axis=1, keepdims=True)
            top[head] = jnp.broadcast_to(top_R1, top.shape[1:])

    @pl.when(step == pl.num_programs(1) - 1)
    def _finish() -> None:
        out[...] = out[...] / sums[...][..., :1]
        sums[...] = top[...] + jnp.log(sums[...])
