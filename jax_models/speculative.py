"""Speculative decoding: a draft guesses, the target checks all guesses at once, and what it would not say is undone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_models.processes import to_host
from loaders.inputs import cache_slots, check_sampling
from loaders.roster import AdapterOfRows
from loaders.speculation import (
    Rows,
    SpeculationReport,
    accept_greedy,
    accept_sampled,
    distribution,
    draw,
    positions_ahead,
    positions_beyond,
)

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
    check_sampling(max_new_tokens, temperature, top_k, top_p, seed, draft_tokens)
    if draft.target is not model:
        raise ValueError(
            f"the draft is bound to another model or version, this model is at version {model.version}."
            " Use model.draft, or draft.bind(model)."
        )
    programs, weights = draft.source.programs, draft.weights
    rng = np.random.default_rng(seed)
    ends, filler = model.checkpoint.endings(ignore_eos=ignore_eos)

    def probabilities(logits: jax.Array) -> np.ndarray:
        return distribution(to_host(logits), temperature, top_p or 1.0, top_k)

    def choose(logits_BV: jax.Array) -> tuple[np.ndarray, np.ndarray | None]:
        """A token a row, and the distribution it was drawn from."""
        if temperature == 0:
            return to_host(jnp.argmax(logits_BV, axis=-1)).astype(np.int32), None
        found_BV = probabilities(logits_BV)
        return draw(found_BV, rng).astype(np.int32), found_BV

    checked = model.checked_prompt(input_ids, attention_mask, **multimodal)
    B, length = checked.input_ids.shape
    T = draft_tokens + 1
    room = cache_slots(length + max_new_tokens + 3 * T)
    cache = programs.empty_cache(rows=B, capacity=room)
    prompt = (checked.input_ids, *model.arrays(checked))
    given = model.of_rows(adapter, B)
    logits_BV, hidden_BTD, seen_next, cache = programs.draft.prefill(weights, *prompt, cache=cache, **given)
    rows = Rows(B, max_new_tokens, ends, filler)
    token_B, _ = choose(logits_BV)
    for row in range(B):
        rows.add(row, [int(token_B[row])])
    next_ids_BT = np.concatenate([checked.input_ids[:, 1:], token_B[:, None]], axis=1)
    next_positions = positions_ahead(checked)
    last_B, position_B = np.full(B, length - 1, np.int32), positions_beyond(checked)
    filled, rounds, accepted = length, 0, 0
    while rows.is_active_B.any():
        logits_BV, state_B1D, cache = programs.draft.extend(
            weights, next_ids_BT, hidden_BTD, next_positions, last_B, seen_next, cache=cache, **given
        )
        seen_next = None  # of the prompt alone
        if filled + 2 * T > room:  # what was just read lies in the last slots, so not before it is read
            cache = programs.draft.compact(cache=cache)
            filled = int(cache.length)
        drafted, drawn_from = [], []
        for guess in range(draft_tokens):
            if guess:
                logits_BV, state_B1D, cache = programs.draft.step(
                    weights, drafted[-1], state_B1D, np.int32(guess - 1), cache=cache, **given
                )
            guess_B, found_BV = choose(logits_BV)
            drafted.append(guess_B)
            drawn_from.append(found_BV)
        drafted_BK = np.stack(drafted, axis=1)
        fed_BT = np.concatenate([token_B[:, None], drafted_BK], axis=1)
        logits_BTV, hidden_BTD, history, cache = programs.draft.verify(weights, fed_BT, cache=cache, **given)
        if temperature == 0:
            count_B, token_B = accept_greedy(drafted_BK, to_host(jnp.argmax(logits_BTV, axis=-1)))
        else:
            count_B, token_B = accept_sampled(drafted_BK, np.stack(drawn_from, axis=1), probabilities(logits_BTV), rng)
        count_B, token_B = count_B.astype(np.int32), token_B.astype(np.int32)
        rounds += int(rows.is_active_B.sum())
        accepted += int(count_B[rows.is_active_B].sum())
        for row in range(B):
            rows.add(row, [*map(int, drafted_BK[row, : count_B[row]]), int(token_B[row])])
        kept_B = np.where(rows.is_active_B, count_B + 1, 0).astype(np.int32)  # a row that has ended needs no more room
        cache = programs.draft.keep(history, kept_B, T, cache=cache)
        steps_T = np.arange(T)
        next_ids_BT = np.where(steps_T < count_B[:, None], np.pad(drafted_BK, ((0, 0), (0, 1))), token_B[:, None])
        next_positions = (position_B[:, None] + steps_T + 1).astype(np.int32)
        last_B, position_B = count_B, position_B + kept_B
        filled += T
    report = SpeculationReport(rounds, rounds * draft_tokens, accepted)
    return jnp.asarray(rows.finished(), jnp.int32), report
