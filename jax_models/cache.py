"""What decoding keeps: keys and values, convolution and recurrent state; a pytree that steps pass on and donate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jax_models.layers.gated_delta import keep_first
from jax_models.layers.step import Entry, LayerCache
from jax_models.sharding import entry_sharding, row_sharding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The state of a stage for rows that end at the same slot.

    Attributes:
        layers: layer number as text -> what the layer keeps, by name.
        key_mask: bool [B, S], slots that hold a real token.
        position: int32 [B], position of each row's next token.
        length: int32, slots filled.
    """

    layers: dict[str, LayerCache]
    key_mask: jax.Array
    position: jax.Array
    length: jax.Array

    def advanced(self, layers: dict[str, LayerCache], key_mask: jax.Array, mask_BT: jax.Array) -> Cache:
        """The cache after T more slots; positions advance by the real tokens among them."""
        real_B = jnp.sum(mask_BT, axis=1, dtype=jnp.int32)
        return Cache(layers, key_mask, self.position + real_B, self.length + mask_BT.shape[1])

    def without_history(self) -> tuple[Cache, dict[str, LayerCache]]:
        """The cache as ``empty_cache`` shapes it, and what its layers left for undoing some of the last tokens."""
        layers = {name: dict(parts) for name, parts in self.layers.items()}
        history = {
            name: {key: parts.pop(key) for key in list(parts) if key.endswith("_history")}
            for name, parts in layers.items()
        }
        return dataclasses.replace(self, layers=layers), history

    def kept(self, history: dict[str, LayerCache], count_B: jax.Array, tokens: int) -> Cache:
        """Back to the first ``count_B`` of the last ``tokens`` tokens of each row; those were all real.

        Slots of the others stay empty for good, whatever finite values lie in them; ``compacted`` gets rid of them. A
        row of which nothing is kept has ended: its convolution and recurrent state mean nothing from then on.
        """
        first = self.length - tokens
        slots_S = jnp.arange(self.key_mask.shape[1])
        is_dropped_BS = slots_S >= first + count_B[:, None]
        layers = {name: parts | keep_first(history[name], count_B) for name, parts in self.layers.items()}
        return Cache(layers, self.key_mask & ~is_dropped_BS, self.position + count_B - tokens, self.length)

    def compacted(self) -> Cache:
        """The same tokens without the empty slots that all rows can do without; rows end at the same slot again."""
        S = self.key_mask.shape[1]
        slots_S = jnp.arange(S)
        rank_BS = jnp.where(slots_S < self.length, self.key_mask.astype(jnp.int32), 2)  # empty, real, not yet used
        order_BS = jnp.argsort(rank_BS, axis=1, stable=True)
        length = jnp.max(jnp.sum(self.key_mask, axis=1, dtype=jnp.int32))
        order_BS = jnp.roll(order_BS, length - self.length, axis=1)

        def moved(array: jax.Array, has_slots: bool) -> jax.Array:
            return jnp.take_along_axis(array, order_BS[:, None, :, None], axis=2) if has_slots else array

        layers = {
            name: {key: moved(array, key in ("key", "value")) for key, array in parts.items()}
            for name, parts in self.layers.items()
        }
        key_mask = jnp.take_along_axis(self.key_mask, order_BS, axis=1) & (slots_S < length)
        return Cache(layers, key_mask, self.position, length)


@dataclass(frozen=True)
class VersionedCache:
    """A cache and what it was computed with; no other weights may read it (law 7).

    Attributes:
        arrays: keys, values and states.
        version: of the model, to be said where it is refused.
        weights_id: of its weights, which decides: two models of one version may differ in them.
        slot: int32 [B], of each row's adapter; it goes on with it.
        content: digest of the prompt, the adapters and the tokens since: several processes may not go on with different
            ones. Of one process it is empty, for nobody asks.
    """

    arrays: Cache
    version: int
    weights_id: object
    slot: np.ndarray
    content: str

    @property
    def capacity(self) -> int:
        """Slots a row has."""
        return self.arrays.key_mask.shape[1]

    @property
    def is_spent(self) -> bool:
        """Whether a step wrote in its memory. XLA may leave small arrays alone, as jax 0.11 does its length."""
        first = next(iter(self.arrays.layers.values()), {})
        return any(array.is_deleted() for array in (self.arrays.length, *first.values()))


def empty_cache(
    entries: dict[str, dict[str, Entry]],
    *,
    rows: int,
    capacity: int,
    dtype: Any,
    mesh: Mesh | None,
    make: Callable[..., Any],
) -> Cache:
    """A cache with no token in it, of what ``make(shape, dtype, sharding=...)`` returns.

    Every layer has its own buffers: a donated buffer must not be seen twice.
    """
    layers = {
        name: {
            key: make(entry.shape, entry.dtype or dtype, sharding=entry_sharding(mesh, entry.shape, entry.axes))
            for key, entry in parts.items()
        }
        for name, parts in entries.items()
    }
    by_row, whole = row_sharding(mesh, rows), row_sharding(mesh, None)
    return Cache(
        layers,
        make((rows, capacity), jnp.bool_, sharding=by_row),
        make((rows,), jnp.int32, sharding=by_row),
        make((), jnp.int32, sharding=whole),
    )


def placed(cache: Cache, entries: dict[str, dict[str, Entry]], mesh: Mesh | None) -> Cache:
    """Inside a program: the cache where ``empty_cache`` puts it, so that every step donates and none compiles anew."""
    if mesh is None:
        return cache
    rows, capacity = cache.key_mask.shape

    def where(shape: tuple[int, ...], dtype: Any, *, sharding: NamedSharding) -> NamedSharding:
        return sharding

    wanted = empty_cache(entries, rows=rows, capacity=capacity, dtype=None, mesh=mesh, make=where)
    return jax.tree.map(jax.lax.with_sharding_constraint, cache, wanted)


def zeros(shape: tuple[int, ...], dtype: Any, *, sharding: NamedSharding | None) -> jax.Array:
    return jnp.zeros(shape, dtype, device=sharding)
