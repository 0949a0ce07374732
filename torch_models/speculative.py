"""Speculative decoding: a draft guesses, the target checks all guesses at once, and what it would not say is undone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loaders.inputs import cache_slots, check_sampling
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
    from torch_models.draft import Draft
    from torch_models.model import Model


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
    **multimodal: Any,
) -> tuple[torch.Tensor, SpeculationReport]:
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
        multimodal: images and videos, as for the model itself; the draft sees them too.
    Returns:
        int64 [B, N] as of ``generate``, and what the draft was worth.
    Raises:
        ValueError: options out of range, bad inputs, a pipeline stage, or a draft of another model or version.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p, seed, draft_tokens)
    if draft.target is not model:
        raise ValueError(
            f"the draft is bound to another model or version, this model is at version {model.version}."
            " Use model.draft, or draft.bind(model)."
        )
    rng = np.random.default_rng(seed)
    ends, filler = model.checkpoint.endings(ignore_eos=ignore_eos)

    def probabilities(logits: torch.Tensor) -> np.ndarray:
        return distribution(logits.cpu().numpy(), temperature, top_p or 1.0, top_k)

    def choose(logits_BV: torch.Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """A token a row, and the distribution it was drawn from."""
        if temperature == 0:
            return logits_BV.argmax(-1).cpu().numpy(), None
        found_BV = probabilities(logits_BV)
        return draw(found_BV, rng), found_BV

    checked = model.checked_prompt(input_ids, attention_mask, **multimodal)
    B, length = checked.input_ids.shape
    T = draft_tokens + 1
    room = cache_slots(length + max_new_tokens + 3 * T)
    cache = draft.empty_cache(B, room)
    hidden_BTD, seen = model.read_into(checked, cache)
    logits_BV = model.last_logits(hidden_BTD)
    rows = Rows(B, max_new_tokens, ends, filler)
    token_B, _ = choose(logits_BV)
    for row in range(B):
        rows.add(row, [int(token_B[row])])
    next_ids_BT = np.concatenate([checked.input_ids[:, 1:], token_B[:, None]], axis=1)
    next_positions, seen_next = positions_ahead(checked), None if seen is None else seen.ahead()
    last_B, position_B = np.full(B, length - 1), positions_beyond(checked)
    part, rounds, accepted = cache.with_room(0), 0, 0  # of the cache: no run reads more than is filled
    while rows.is_active_B.any():
        logits_BV, state_B1D = draft.extend(
            model.long(next_ids_BT), hidden_BTD, model.long(next_positions), model.long(last_B), part, seen_next
        )
        seen_next = None  # of the prompt alone
        if cache.length + 2 * T > room:  # what was just read lies in the last slots, so not before it is read
            cache.compact()
        filled, part = cache.length, cache.with_room(T)
        drafted, drawn_from = [], []
        for guess in range(draft_tokens):
            if guess:
                logits_BV, state_B1D = draft.step(model.long(drafted[-1]), state_B1D, guess - 1, part)
            guess_B, found_BV = choose(logits_BV)
            drafted.append(guess_B)
            drawn_from.append(found_BV)
        drafted_BK = np.stack(drafted, axis=1)
        fed_BT = np.concatenate([token_B[:, None], drafted_BK], axis=1)
        positions_BT = part.position[:, None] + torch.arange(T, device=model.device)
        part.key_mask[:, filled : filled + T] = True
        x_BTD = model.embed(model.long(fed_BT))
        hidden_BTD = model.decoder(x_BTD, positions_BT, part.key_mask, part, keep_history=True)
        logits_BTV = model.head(hidden_BTD)
        if temperature == 0:
            count_B, token_B = accept_greedy(drafted_BK, logits_BTV.argmax(-1).cpu().numpy())
        else:
            count_B, token_B = accept_sampled(drafted_BK, np.stack(drawn_from, axis=1), probabilities(logits_BTV), rng)
        rounds += int(rows.is_active_B.sum())
        accepted += int(count_B[rows.is_active_B].sum())
        for row in range(B):
            rows.add(row, [*map(int, drafted_BK[row, : count_B[row]]), int(token_B[row])])
        kept_B = np.where(rows.is_active_B, count_B + 1, 0)  # a row that has ended needs no more room
        part.keep(model.long(kept_B), T)
        steps_T = np.arange(T)
        next_ids_BT = np.where(steps_T < count_B[:, None], np.pad(drafted_BK, ((0, 0), (0, 1))), token_B[:, None])
        next_positions = position_B[:, None] + steps_T + 1
        last_B, position_B = count_B, position_B + kept_B
    report = SpeculationReport(rounds, rounds * draft_tokens, accepted)
    return model.long(rows.finished()), report
