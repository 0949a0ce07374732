"""Speculative decoding: a draft guesses, the target checks all guesses at once, and what it would not say is undone."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from loaders.adapters.roster import AdapterOfRows
from loaders.host.inputs import bucket
from loaders.host.sampling import SamplingParams
from loaders.host.speculation import Rows, Speculation, SpeculationReport
from torch_models.generate import best

if TYPE_CHECKING:
    from torch_models.draft import Draft
    from torch_models.model import Model


def generate_with_draft(
    model: Model,
    input_ids: Any,
    attention_mask: Any,
    params: SamplingParams,
    *,
    draft: Draft,
    adapter: AdapterOfRows = None,
    **multimodal: Any,
) -> tuple[torch.Tensor, SpeculationReport]:
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
        int64 [B, N] as of ``generate``, and what the draft was worth.
    Raises:
        ValueError: bad inputs, or a pipeline stage.
    """
    assert params.draft_tokens is not None, "with a draft there are guesses"
    checked = model.checked_prompt(input_ids, attention_mask, **multimodal)
    (B, length), T = checked.input_ids.shape, params.draft_tokens + 1
    rows = Rows(B, params.max_new_tokens, *model.checkpoint.endings(ignore_eos=params.ignore_eos))
    said = Speculation(
        checked,
        rows,
        params,
        best=lambda logits: best(logits).cpu().numpy(),
        on_host=lambda logits: logits.detach().cpu().numpy(),
    )
    slots = partial(model.roster.rows, adapter, B)
    model.agreed("what is asked for", slots, lambda slot_B: f"adapters of rows {slot_B.tolist()}")
    with model.running(adapter, checked.input_ids):
        room = bucket(length + params.max_new_tokens + 3 * T)
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
            for offset in range(params.draft_tokens - 1):
                logits_BV, state_B1D = draft.step(model.long(guess_B), state_B1D, offset, part)
                guess_B = said.guess(logits_BV)
            positions_BT = part.position[:, None] + torch.arange(T, device=model.device)
            part.key_mask[:, filled : filled + T] = True
            x_BTD = model.embed(model.long(said.fed))
            hidden_BTD = model.decoder(x_BTD, positions_BT, part.key_mask, part, keep_history=True)
            part.keep(model.long(said.verify(model.head(hidden_BTD))), T)
        return model.long(rows.finished()), said.report
