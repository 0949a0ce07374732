"""Speculative decoding: a draft guesses, the target checks all guesses at once, and what it would not say is undone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from loaders.inputs import bucket, check_sampling
from loaders.speculation import Rows, Sampling, Speculation, SpeculationReport

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
    checked = model.checked_prompt(input_ids, attention_mask, **multimodal)
    (B, length), T = checked.input_ids.shape, draft_tokens + 1
    rows = Rows(B, max_new_tokens, *model.checkpoint.endings(ignore_eos=ignore_eos))
    said = Speculation(
        checked,
        rows,
        draft_tokens,
        Sampling(temperature, top_k, top_p, seed),
        best=lambda logits: logits.argmax(-1).cpu().numpy(),
        on_host=lambda logits: logits.cpu().numpy(),
    )
    room = bucket(length + max_new_tokens + 3 * T)
    cache = draft.empty_cache(B, room)
    hidden_BTD, seen = model.read_into(checked, cache)
    said.begin(model.last_logits(hidden_BTD))
    seen_next = None if seen is None else seen.ahead()
    part = cache.with_room(0)  # of the cache: no run reads more than is filled
    while rows.is_active_B.any():
        ids_BT, positions, last_B = map(model.long, (said.next_ids_BT, said.next_positions, said.last_B))
        logits_BV, state_B1D = draft.extend(ids_BT, hidden_BTD, positions, last_B, part, seen_next)
        seen_next = None  # of the prompt alone
        if cache.length + 2 * T > room:  # what was just read lies in the last slots, so not before it is read
            cache.compact()
        filled, part = cache.length, cache.with_room(T)
        guess_B = said.guess(logits_BV)
        for offset in range(draft_tokens - 1):
            logits_BV, state_B1D = draft.step(model.long(guess_B), state_B1D, offset, part)
            guess_B = said.guess(logits_BV)
        positions_BT = part.position[:, None] + torch.arange(T, device=model.device)
        part.key_mask[:, filled : filled + T] = True
        x_BTD = model.embed(model.long(said.fed))
        hidden_BTD = model.decoder(x_BTD, positions_BT, part.key_mask, part, keep_history=True)
        part.keep(model.long(said.verify(model.head(hidden_BTD))), T)
    return model.long(rows.finished()), said.report
