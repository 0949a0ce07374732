"""What a decoder layer is told besides its hidden states, and what it keeps from one run to the next."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jax_models.layers.rotary import rotary_embedding

LayerCache = dict[str, jax.Array]  # what one layer keeps, by name


@dataclass(frozen=True)
class Entry:
    """One array of a layer's cache: its shape, and its dtype where that is not what is computed in.

    ``axes`` name the axes as rules do (``B`` rows, ``KH`` key/value heads), so that a mesh can cut them.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: Any = None


@dataclass(frozen=True)
class Step:
    """The tokens of one run, as a layer sees them.

    Attributes:
        cos_BTR: cosines of the rotary embedding, float32.
        sin_BTR: sines.
        visible_BTS: bool, which keys each query may see.
        mask_BT: bool, which tokens are real.
        start: slot of the first token in the cache, an integer or int32 [].
        keep_history: leave what undoing some of the tokens takes (``Cache.keep``).
        is_first: nothing is in the cache before these tokens; ``visible_BTS`` is of them alone, S = T.
        window: so many keys at most a query sees, with itself; None: all before it.
    """

    cos_BTR: jax.Array
    sin_BTR: jax.Array
    visible_BTS: jax.Array
    mask_BT: jax.Array
    start: jax.Array | int
    keep_history: bool = False
    is_first: bool = False
    window: int | None = None


def visible(key_mask_BS: jax.Array, start: jax.Array | int, length: int, window: int | None) -> jax.Array:
    """Which keys each of ``length`` queries from slot ``start`` on may see, bool [B, T, S].

    Real keys not after the query, at most ``window`` of them with itself; and always itself, so that a padded query has
    something to average and stays finite.
    """
    query_T1 = start + jnp.arange(length)[:, None]
    key_1S = jnp.arange(key_mask_BS.shape[1])[None, :]
    causal_TS = key_1S <= query_T1
    if window is not None:
        causal_TS &= key_1S > query_T1 - window
    return (causal_TS[None] & key_mask_BS[:, None, :]) | (key_1S == query_T1)[None]


def steps(
    config: Any,
    layers: Iterable[int],
    position_ids: jax.Array,
    key_mask_BS: jax.Array,
    start: jax.Array | int,
    *,
    length: int,
    is_cached: bool,
    keep_history: bool = False,
    is_first: bool = False,
) -> dict[int, Step]:
    """The step of each of ``layers``; layers with one rotary embedding and one window share theirs.

    Args:
        config: of the family: ``rope(layer)``, ``window(layer)``, ``rotary_dim``, ``max_position_embeddings``.
        layers: decoder layers by number.
        position_ids: int32 [B, T], or [3, B, T] for time, height and width.
        key_mask_BS: bool, slots that hold a real token, those of this run included.
        start: slot of the first token.
        length: T.
        is_cached: there may be tokens before these.
        keep_history: see ``Step``.
        is_first: see ``Step``; only the first T slots are looked at then.
    """
    if is_first:
        start, key_mask_BS = 0, key_mask_BS[:, :length]
    positions_BT = position_ids if position_ids.ndim == 2 else position_ids[0]
    # a frequency that depends on the length: over the batch, as transformers; with a cache, each row as if alone
    length_B = jnp.max(positions_BT, axis=1) + 1
    if not is_cached:
        length_B = jnp.broadcast_to(jnp.max(length_B), length_B.shape)
    mask_BT = key_mask_BS
    if is_cached:
        mask_BT = jax.lax.dynamic_slice_in_dim(key_mask_BS, start, length, axis=1, allow_negative_indices=False)
    found: dict[tuple[Any, Any], Step] = {}
    by_layer: dict[int, Step] = {}
    for layer in layers:
        rope, window = config.rope(layer), config.window(layer)
        if (rope, window) not in found:
            cos_BTR, sin_BTR = rotary_embedding(
                rope, config.rotary_dim, config.max_position_embeddings, position_ids, length_B
            )
            seen_BTS = visible(key_mask_BS, start, length, window)
            found[rope, window] = Step(cos_BTR, sin_BTR, seen_BTS, mask_BT, start, keep_history, is_first, window)
        by_layer[layer] = found[rope, window]
    return by_layer
