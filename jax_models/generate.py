"""Text generation with a key/value cache: greedy, temperature, top-k, top-p; ragged batches."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_models.processes import check_sampling_alike, to_host
from loaders.inputs import seed_bits
from loaders.roster import AdapterOfRows

if TYPE_CHECKING:
    from jax_models.model import Model


@partial(jax.jit, static_argnames=("top_k",))
def sample(
    logits_BV: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array, top_k: int | None
) -> jax.Array:
    """One token a row, int32 [B], from softmax(logits / temperature) cut to the best ``top_k``, then to ``top_p``.

    ``top_p``: the smallest set of best tokens whose probability reaches it; the best token always stays.
    """
    size = logits_BV.shape[-1] if top_k is None else min(top_k, logits_BV.shape[-1])
    best_BC, token_BC = jax.lax.top_k(logits_BV / temperature, size)
    probability_BC = jax.nn.softmax(best_BC, axis=-1)
    before_BC = jnp.cumsum(probability_BC, axis=-1) - probability_BC
    kept_BC = jnp.where(before_BC < top_p, best_BC, -jnp.inf)
    chosen_B1 = jax.random.categorical(key, kept_BC, axis=-1)[:, None]
    return jnp.take_along_axis(token_BC, chosen_B1, axis=-1)[:, 0].astype(jnp.int32)


def generate(
    model: Model,
    input_ids: Any,
    attention_mask: Any = None,
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    ignore_eos: bool = False,
    adapter: AdapterOfRows = None,
    **multimodal: Any,
) -> jax.Array:
    """Continue every row of a ragged batch; greedily, each as if it were alone (a draw depends on the batch's shape).

    Args:
        model: the whole model.
        input_ids: integers [B, T].
        attention_mask: [B, T], padding on either side.
        max_new_tokens: at most so many per row.
        temperature: 0 = the best token (the lowest id among equals); else the softmax temperature.
        top_k: sample among the best k only.
        top_p: sample among the best tokens that together reach this probability, in (0, 1].
        seed: of the sampling, 0 to 2**63 - 1; ignored at temperature 0.
        ignore_eos: go on after an end-of-sequence token.
        adapter: of the rows, see ``Model``.
        multimodal: images and videos, as for the model itself.
    Returns:
        int32 [B, N], N <= max_new_tokens: until every row has ended. A row that ended is filled with pad_token_id
        (or its end token when the config names none).
    Raises:
        ValueError: options out of range, bad inputs, or a pipeline stage.
    """
    check_sampling_alike(model.mesh, max_new_tokens, temperature, top_k, top_p, seed)
    ends, filler = model.checkpoint.endings(ignore_eos=ignore_eos)
    of_rows = {"adapter": adapter, **multimodal}
    logits_BV, cache = model.prefill(input_ids, attention_mask, max_new_tokens=max_new_tokens, **of_rows)
    key = jax.random.key(seed_bits(seed))
    has_ended_B = np.zeros(logits_BV.shape[0], bool)
    tokens: list[np.ndarray] = []
    for step in range(max_new_tokens):
        if temperature == 0:
            token_B = to_host(jnp.argmax(logits_BV, axis=-1)).astype(np.int32)
        else:
            step_key = jax.random.fold_in(key, step)
            drawn = sample(logits_BV, step_key, np.float32(temperature), np.float32(top_p or 1.0), top_k)
            token_B = to_host(drawn)
        tokens.append(np.where(has_ended_B, np.int64(filler), token_B))  # the filler need not be a token: -1 is common
        has_ended_B |= np.isin(token_B, ends)
        if has_ended_B.all() or step == max_new_tokens - 1:
            break
        logits_BV, cache = model.decode(token_B, cache)
    return jnp.asarray(np.stack(tokens, axis=1), jnp.int32)
