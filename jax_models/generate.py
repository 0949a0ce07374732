"""Text generation with a key/value cache: greedy, temperature, top-k, top-p; ragged batches."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_models.processes import to_host
from loaders.host.sampling import NO_TOKEN, SamplingParams, check_chosen, seed_bits

if TYPE_CHECKING:
    from jax_models.model import Model


@jax.jit
def best(logits: jax.Array) -> jax.Array:
    """The token of the highest logit along the last axis, int32; ``NO_TOKEN`` where that is NaN or infinite."""
    token_ids = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # asked of each: where devices have parts of a row, the maximum of their maxima is no NaN that one of them found
    is_bad = jnp.any(~(logits < jnp.inf), axis=-1) | (jnp.max(logits, axis=-1) == -jnp.inf)
    return jnp.where(is_bad, NO_TOKEN, token_ids)


@partial(jax.jit, static_argnames=("top_k",))
def sample(
    logits_BV: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array, top_k: int | None
) -> jax.Array:
    """One token a row, int32 [B], from softmax(logits / temperature) cut to the best ``top_k``, then to ``top_p``.

    ``top_p``: the smallest set of best tokens whose probability reaches it; the best token always stays.
    ``NO_TOKEN`` where the highest is NaN or infinite.
    """
    size = logits_BV.shape[-1] if top_k is None else min(top_k, logits_BV.shape[-1])
    best_BC, token_BC = jax.lax.top_k(logits_BV / temperature, size)
    probability_BC = jax.nn.softmax(best_BC, axis=-1)
    before_BC = jnp.cumsum(probability_BC, axis=-1) - probability_BC
    kept_BC = jnp.where(before_BC < top_p, best_BC, -jnp.inf)
    chosen_B1 = jax.random.categorical(key, kept_BC, axis=-1)[:, None]
    token_B = jnp.take_along_axis(token_BC, chosen_B1, axis=-1)[:, 0].astype(jnp.int32)
    is_nan_B = jnp.isnan(probability_BC[:, 0])  # NaN anywhere is NaN everywhere, and it is sorted to the front
    return jnp.where(is_nan_B, NO_TOKEN, token_B)


def generate(model: Model, input_ids: Any, attention_mask: Any, params: SamplingParams, **of_rows: Any) -> jax.Array:
    """See ``Model.generate``. ``of_rows``: adapters, images and videos, as for the model itself."""
    ends, filler = model.checkpoint.endings(ignore_eos=params.ignore_eos)
    logits_BV, cache = model.prefill(input_ids, attention_mask, max_new_tokens=params.max_new_tokens, **of_rows)
    key = jax.random.key(seed_bits(params.seed), impl="threefry2x32")
    has_ended_B = np.zeros(logits_BV.shape[0], bool)
    tokens: list[np.ndarray] = []
    for step in range(params.max_new_tokens):
        if params.is_greedy:
            token_B = to_host(best(logits_BV))
        else:
            step_key = jax.random.fold_in(key, step)
            warmth, nucleus = np.float32(params.temperature), np.float32(params.nucleus)
            token_B = to_host(sample(logits_BV, step_key, warmth, nucleus, params.top_k))
        check_chosen(token_B)
        tokens.append(np.where(has_ended_B, np.int64(filler), token_B))  # the filler need not be a token: -1 is common
        has_ended_B |= np.isin(token_B, ends)
        if has_ended_B.all() or step == params.max_new_tokens - 1:
            break
        logits_BV, cache = model.decode_step(model.next_ids(token_B, cache), cache)
    return jnp.asarray(np.stack(tokens, axis=1), jnp.int32)
