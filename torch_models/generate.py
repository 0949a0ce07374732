"""Text generation with a key/value cache: greedy, temperature, top-k, top-p; ragged batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from loaders.sampling import SamplingParams, seed_bits
from torch_models.graphs import Batch

if TYPE_CHECKING:
    from torch_models.model import Model


def sample(
    logits_BV: torch.Tensor, generator: torch.Generator, temperature: float, top_p: float, top_k: int | None
) -> torch.Tensor:
    """One token a row, int64 [B], from softmax(logits / temperature) cut to the best ``top_k``, then to ``top_p``.

    ``top_p``: the smallest set of best tokens whose probability reaches it; the best token always stays.
    """
    size = logits_BV.shape[-1] if top_k is None else min(top_k, logits_BV.shape[-1])
    best_BV, token_BV = (logits_BV / temperature).sort(
        dim=-1, descending=True, stable=True
    )  # the lowest of equals first
    best_BC, token_BC = best_BV[:, :size], token_BV[:, :size]
    probability_BC = best_BC.softmax(-1)
    is_cut_BC = probability_BC.cumsum(-1) - probability_BC >= top_p
    is_cut_BC[:, 0] = False  # a share that float32 has no number for is 0, too
    kept_BC = probability_BC.masked_fill(is_cut_BC, 0.0)
    chosen_B1 = torch.multinomial(kept_BC, 1, generator=generator)
    return token_BC.gather(-1, chosen_B1)[:, 0]


def generate(
    model: Model, input_ids: Any, attention_mask: Any, params: SamplingParams, *, graphs: bool = False, **of_rows: Any
) -> torch.Tensor:
    """See ``Model.generate``. ``of_rows``: adapters, images and videos, as for the model itself."""
    ends, filler = model.checkpoint.endings(ignore_eos=params.ignore_eos)
    ends = model.long(ends)
    prefill = model.graphs.prefill if graphs else model.prefill
    logits_BV, state = prefill(input_ids, attention_mask, max_new_tokens=params.max_new_tokens, **of_rows)
    generator = torch.Generator(model.device).manual_seed(seed_bits(params.seed))
    has_ended_B = torch.zeros(logits_BV.shape[0], dtype=torch.bool, device=model.device)
    tokens: list[torch.Tensor] = []
    for step in range(params.max_new_tokens):
        if params.is_greedy:
            token_B = logits_BV.argmax(-1)
        else:
            token_B = sample(logits_BV, generator, params.temperature, params.nucleus, params.top_k)
        tokens.append(token_B.masked_fill(has_ended_B, filler))  # the filler need not be a token: -1 is common
        has_ended_B |= torch.isin(token_B, ends)
        if has_ended_B.all() or step == params.max_new_tokens - 1:
            break
        logits_BV = state.decode(token_B) if isinstance(state, Batch) else model.decode(token_B, state)[0]
    return torch.stack(tokens, dim=1)
