"""Speculative decoding: a draft guesses, the target checks all guesses at once, and what it would not say is undone."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_models.generate import best
from jax_models.processes import to_host
from loaders.adapters.roster import AdapterOfRows
from loaders.host.inputs import bucket
from loaders.host.sampling import SamplingParams
from loaders.host.speculation import Rows, Speculation, SpeculationReport

if TYPE_CHECKING:
    from jax_models.draft import Draft
    from jax_models.model import Model


def generate_with_draft(
    model: Model,
    input_ids: Any,
    attention_mask: Any,
    params: SamplingParams,
    *,
    draft: Draft,
    adapter: AdapterOfRows = None,
    **multimodal: Any,
) -> tuple[jax.Array, SpeculationReport]:
    """The same greedy tokens as of ``generate``, sampled ones of the same distribution; in fewer runs of the target.

    Args:
        model: the whole model.
        input_ids: integers [B, T].
        attention_mask: [B, T], padding on either side.
        params: with the guesses in each round, which other runs have none of.
        draft: bound to ``model``.
        adapter: of the rows, see ``Model``.
        multimodal: images and videos, as for the model itself; the draft sees them too.
    Returns:
        int32 [B, N] as of ``generate``, and what the draft was worth.
    Raises:
        ValueError: bad inputs, or a pipeline stage.
    """
    assert params.draft_tokens is not None, "with a draft there are guesses"
    programs, weights = draft.source.programs, draft.weights
    checked = model.checked_prompt(input_ids, attention_mask, **multimodal)
    (B, length), T = checked.input_ids.shape, params.draft_tokens + 1
    rows = Rows(B, params.max_new_tokens, *model.checkpoint.endings(ignore_eos=params.ignore_eos))
    said = Speculation(
        checked,
        rows,
        params,
        best=lambda logits: to_host(best(logits)),
        on_host=to_host,
    )
    room, filled = bucket(length + params.max_new_tokens + 3 * T), length
    cache = programs.empty_cache(rows=B, capacity=room)
    slots = partial(model.roster.rows, adapter, B)
    slot_B = model.agreed("what is asked for", slots, lambda found: f"adapters of rows {found.tolist()}")
    given = model.of_slots(slot_B)
    logits_BV, hidden_BTD, seen_next, cache = programs.draft.prefill(
        weights, model.batch(checked), cache=cache, **given
    )
    said.begin(logits_BV)
    while rows.is_active_B.any():
        read = (said.next_ids_BT, hidden_BTD, said.next_positions, said.last_B, seen_next)
        logits_BV, state_B1D, cache = programs.draft.extend(weights, *read, cache=cache, **given)
        seen_next = None  # of the prompt alone
        if filled + 2 * T > room:  # what was just read lies in the last slots, so not before it is read
            cache = programs.draft.compact(cache=cache)
            filled = int(cache.length)
        guess_B = said.guess(logits_BV)
        for offset in range(params.draft_tokens - 1):
            guessed = (guess_B, state_B1D, np.int32(offset))
            logits_BV, state_B1D, cache = programs.draft.step(weights, *guessed, cache=cache, **given)
            guess_B = said.guess(logits_BV)
        logits_BTV, hidden_BTD, history, cache = programs.draft.verify(weights, said.fed, cache=cache, **given)
        cache = programs.draft.keep(history, said.verify(logits_BTV), T, cache=cache)
        filled += T
    return jnp.asarray(rows.finished(), jnp.int32), said.report
