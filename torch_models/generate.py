"""Text generation with a key/value cache: greedy, temperature, top-k, top-p; ragged batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from loaders.host.sampling import NO_TOKEN, SamplingParams, check_chosen, seed_bits
from torch_models.graphs import Batch

if TYPE_CHECKING:
    from torch_models.model import Model


def best(logits: torch.Tensor) -> torch.Tensor:
    """The token of the highest logit along the last axis, int64; ``NO_TOKEN`` where that is NaN or infinite."""
    return logits.argmax(-1).masked_fill(~logits.amax(-1).isfinite(), NO_TOKEN)


def sample(
    logits_BV: torch.Tensor, generator: torch.Generator, temperature: float, top_p: float, top_k: int | None
) -> torch.Tensor:
    """One token a row, int64 [B], from softmax(logits / temperature) cut to the best ``top_k``, then to ``top_p``.

    ``top_p``: the smallest set of best tokens whose probability reaches it; the best token always stays.
    ``NO_TOKEN`` where the highest is NaN or infinite.
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
    is_nan_B = probability_BC[:, 0].isnan()  # NaN anywhere is NaN everywhere
    chosen_B1 = torch.multinomial(kept_BC.masked_fill(is_nan_B[:, None], 1.0), 1, generator=generator)
    return token_BC.gather(-1, chosen_B1)[:, 0].masked_fill(is_nan_B, NO_TOKEN)


def generate(
    model: Model, input_ids: Any, attention_mask: Any, params: SamplingParams, *, graphs: bool = False, **of_rows: Any
) -> torch.Tensor:
    """See ``Model.generate``. ``of_rows``: adapters, images and videos, as for the model itself."""
    ends, filler = model.checkpoint.endings(ignore_eos=params.ignore_eos)
    prefill = model.graphs.prefill if graphs else model.prefill
    logits_BV, state = prefill(input_ids, attention_mask, max_new_tokens=params.max_new_tokens, **of_rows)
    generator = torch.Generator(model.device).manual_seed(seed_bits(params.seed))
    has_ended_B = np.zeros(logits_BV.shape[0], bool)
    tokens: list[np.ndarray] = []
    for step in range(params.max_new_tokens):
        if params.is_greedy:
            token_B = best(logits_BV)
        else:
            token_B = sample(logits_BV, generator, params.temperature, params.nucleus, params.top_k)
        said_B = token_B.cpu().numpy()
        check_chosen(said_B)
        tokens.append(np.where(has_ended_B, filler, said_B))  # the filler need not be a token: -1 is common
        has_ended_B |= np.isin(said_B, ends)
        if has_ended_B.all() or step == params.max_new_tokens - 1:
            break
        logits_BV = state.decode(token_B) if isinstance(state, Batch) else model.decode(token_B, state)[0]
    return model.long(np.stack(tokens, axis=1))
