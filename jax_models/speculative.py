"""Speculative decoding: a draft guesses, the target checks all guesses at once, and what it would not say is undone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_models.processes import check_sampling_alike, to_host
from loaders.inputs import bucket
from loaders.roster import AdapterOfRows
from loaders.speculation import Rows, Sampling, Speculation, SpeculationReport

if TYPE_CHECKING:
    from jax_models.draft import Draft
    from jax_models.model import Model


def generate_with_draft(
    model: Model,
    input_ids: Any,
    attention_mask: Any = None,
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    *,
    draft: Draft,
    draft_tokens: int = 3,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    ignore_eos: bool = False,
    adapter: AdapterOfRows = None,
    **multimodal: Any,
) -> tuple[jax.Array, SpeculationReport]:
    """As ``generate``: the same greedy tokens, sampled ones of the same distribution; in fewer runs of the target.

    Args:
        model: the whole model.
        input_ids: integers [B, T].
        attention_mask: [B, T], padding on either side.
        max_new_tokens: at most so many per row.
        temperature: 0 = the best token; else the softmax temperature.
        draft: bound to ``model``.
        draft_tokens: guesses in each round.
        top_k: sample among the best k only.
        top_p: sample among the best tokens that together reach this probability, in (0, 1].
        seed: of the sampling, 0 to 2**63 - 1.
        ignore_eos: go on after an end-of-sequence token.
        adapter: of the rows, see ``Model``.
        multimodal: images and videos, as for the model itself; the draft sees them too.
    Returns:
        int32 [B, N] as of ``generate``, and what the draft was worth.
    Raises:
        ValueError: options out of range, bad inputs, a pipeline stage, or a draft of another model or version.
    """
    check_sampling_alike(model.mesh, max_new_tokens, temperature, top_k, top_p, seed, draft_tokens)
    if draft.target is not model:
        raise ValueError(
            f"the draft is bound to another model or version, this model is at version {model.version}."
            " Use model.draft, or draft.bind(model)."
        )
    programs, weights = draft.source.programs, draft.weights
    checked = model.checked_prompt(input_ids, attention_mask, **multimodal)
    (B, length), T = checked.input_ids.shape, draft_tokens + 1
    rows = Rows(B, max_new_tokens, *model.checkpoint.endings(ignore_eos=ignore_eos))
    said = Speculation(
        checked,
        rows,
        draft_tokens,
        Sampling(temperature, top_k, top_p, seed),
        best=lambda logits: to_host(jnp.argmax(logits, axis=-1)),
        on_host=to_host,
    )
    room, filled = bucket(length + max_new_tokens + 3 * T), length
    cache = programs.empty_cache(rows=B, capacity=room)
    prompt = (checked.input_ids, *model.arrays(checked))
    given = model.of_rows(adapter, B)
    logits_BV, hidden_BTD, seen_next, cache = programs.draft.prefill(weights, *prompt, cache=cache, **given)
    said.begin(logits_BV)
    while rows.is_active_B.any():
        read = (said.next_ids_BT, hidden_BTD, said.next_positions, said.last_B, seen_next)
        logits_BV, state_B1D, cache = programs.draft.extend(weights, *read, cache=cache, **given)
        seen_next = None  # of the prompt alone
        if filled + 2 * T > room:  # what was just read lies in the last slots, so not before it is read
            cache = programs.draft.compact(cache=cache)
            filled = int(cache.length)
        guess_B = said.guess(logits_BV)
        for offset in range(draft_tokens - 1):
            guessed = (guess_B, state_B1D, np.int32(offset))
            logits_BV, state_B1D, cache = programs.draft.step(weights, *guessed, cache=cache, **given)
            guess_B = said.guess(logits_BV)
        logits_BTV, hidden_BTD, history, cache = programs.draft.verify(weights, said.fed, cache=cache, **given)
        cache = programs.draft.keep(history, said.verify(logits_BTV), T, cache=cache)
        filled += T
    return jnp.asarray(rows.finished(), jnp.int32), said.report
