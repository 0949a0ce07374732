"""Text generation with a key/value cache: greedy, temperature, top-k, top-p; ragged batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from loaders.inputs import check_sampling, seed_bits
from loaders.roster import AdapterOfRows
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
    best_BC, token_BC = (logits_BV / temperature).topk(size, dim=-1)
    probability_BC = best_BC.softmax(-1)
    before_BC = probability_BC.cumsum(-1) - probability_BC
    kept_BC = probability_BC.masked_fill(before_BC >= top_p, 0.0)
    chosen_B1 = torch.multinomial(kept_BC, 1, generator=generator)
    return token_BC.gather(-1, chosen_B1)[:, 0]


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
    graphs: bool = False,
    adapter: AdapterOfRows = None,
    **multimodal: Any,
) -> torch.Tensor:
    """Continue every row of a ragged batch; greedily, each as if it were alone (a draw depends on the batch's shape).

    Args:
        model: the whole model.
        input_ids: integers [B, T].
        attention_mask: [B, T], padding on either side.
        max_new_tokens: at most so many per row.
        temperature: 0 = the best token; else the softmax temperature.
        top_k: sample among the best k only.
        top_p: sample among the best tokens that together reach this probability, in (0, 1].
        seed: of the sampling, 0 to 2**63 - 1; ignored at temperature 0.
        ignore_eos: go on after an end-of-sequence token.
        graphs: decode by replaying captured graphs, kept for the next call; see ``torch_models.graphs``.
        adapter: of the rows, see ``Model.forward``.
        multimodal: images and videos, as for the model itself.
    Returns:
        int64 [B, N], N <= max_new_tokens: until every row has ended. A row that ended is filled with pad_token_id
        (or its end token when the config names none).
    Raises:
        ValueError: options out of range, bad inputs, or a pipeline stage.
        RuntimeError: a graph's tensors were moved since it was captured.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
    ends, filler = model.checkpoint.endings(ignore_eos=ignore_eos)
    ends = model.long(ends)
    prefill = model.graphs.prefill if graphs else model.prefill
    of_rows = {"adapter": adapter, **multimodal}
    logits_BV, state = prefill(input_ids, attention_mask, max_new_tokens=max_new_tokens, **of_rows)
    generator = torch.Generator(model.device).manual_seed(seed_bits(seed))
    has_ended_B = torch.zeros(logits_BV.shape[0], dtype=torch.bool, device=model.device)
    tokens: list[torch.Tensor] = []
    for step in range(max_new_tokens):
        if temperature == 0:
            token_B = logits_BV.argmax(-1)
        else:
            token_B = sample(logits_BV, generator, temperature, top_p or 1.0, top_k)
        tokens.append(token_B.masked_fill(has_ended_B, filler))  # the filler need not be a token: -1 is common
        has_ended_B |= torch.isin(token_B, ends)
        if has_ended_B.all() or step == max_new_tokens - 1:
            break
        logits_BV = state.decode(token_B) if isinstance(state, Batch) else model.decode(token_B, state)[0]
    return torch.stack(tokens, dim=1)
