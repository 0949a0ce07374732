"""Key/value cache: a pytree that decoding steps pass on and donate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jax_models.layers.attention import LayerCache
from jax_models.sharding import cache_sharding, row_sharding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of every layer of a stage, for rows that end at the same slot.

    Attributes:
        layers: layer number as text -> keys and values [B, S, K, H].
        key_mask: bool [B, S], slots that hold a real token.
        position: int32 [B], position of each row's next token.
        length: int32, slots filled.
    """

    layers: dict[str, LayerCache]
    key_mask: jax.Array
    position: jax.Array
    length: jax.Array

    def advanced(self, layers: dict[str, LayerCache], key_mask: jax.Array, tokens: int) -> Cache:
        """The cache after ``tokens`` more slots; positions advance by the real tokens among them."""
        real_B = jnp.sum(key_mask, axis=1, dtype=jnp.int32) - jnp.sum(self.key_mask, axis=1, dtype=jnp.int32)
        return Cache(layers, key_mask, self.position + real_B, self.length + tokens)


@dataclass(frozen=True)
class VersionedCache:
    """A cache and the weights version it was computed with; no other version may read it (law 7)."""

    arrays: Cache
    version: int
    weights_id: object

    @property
    def capacity(self) -> int:
        """Slots a row has."""
        return self.arrays.key_mask.shape[1]


def cache_like(
    make: Callable[..., Any],
    layers: range,
    rows: int,
    capacity: int,
    heads: int,
    head_dim: int,
    dtype: Any,
    mesh: Mesh | None,
) -> Cache:
    """Keys and values for every layer, of what ``make(shape, dtype, sharding=...)`` returns.

    Every layer has its own buffers: a donated buffer must not be seen twice.
    """
    shape, cut = (rows, capacity, heads, head_dim), cache_sharding(mesh, rows, heads)
    entries = {
        str(layer): LayerCache(key=make(shape, dtype, sharding=cut), value=make(shape, dtype, sharding=cut))
        for layer in layers
    }
    by_row, whole = row_sharding(mesh, rows), row_sharding(mesh, None)
    return Cache(
        entries,
        make((rows, capacity), jnp.bool_, sharding=by_row),
        make((rows,), jnp.int32, sharding=by_row),
        make((), jnp.int32, sharding=whole),
    )


def placed(cache: Cache, mesh: Mesh | None) -> Cache:
    """Inside a program: the cache where ``empty_cache`` puts it, so that every step donates and none compiles anew."""
    if mesh is None:
        return cache
    rows, _, heads, _ = next(iter(cache.layers.values()))["key"].shape
    whole, by_row, by_head = row_sharding(mesh, None), row_sharding(mesh, rows), cache_sharding(mesh, rows, heads)
    cuts = {0: whole, 1: by_row, 2: by_row, 4: by_head}
    return jax.tree.map(lambda array: jax.lax.with_sharding_constraint(array, cuts[array.ndim]), cache)


def zeros(shape: tuple[int, ...], dtype: Any, *, sharding: NamedSharding | None) -> jax.Array:
    return jnp.zeros(shape, dtype, device=sharding)
