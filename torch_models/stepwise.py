"""What a model computes while it reads rows as generation does: a prompt into a cache, then token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from loaders.adapters.roster import AdapterOfRows
from loaders.host.stepwise import Stepwise, in_all
from torch_models import adapters as lora
from torch_models.taps import Level, collect

if TYPE_CHECKING:
    from torch_models.model import Model


def read_stepwise(
    model: Model,
    rows: Stepwise,
    *,
    adapter: AdapterOfRows,
    level: Level,
    within: str | None,
    inject: Mapping[str, Any] | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, float32 [B, T, V], and taps by path, [B, T, ...]: of the prompts as prefill computes them, then of steps.

    Arguments are those of ``Model.with_taps``.
    """
    prompt = model.checked_prompt(rows.input_ids, rows.attention_mask, **rows.multimodal)
    cache = model.cache_for(prompt, len(rows.token_NB), adapter)
    first, *others = rows.handed(inject)
    with collect(level, within, first) as taps, lora.of_cache(model, cache):
        x_BTD, _ = model.read_into(prompt, cache)
        logits = [model.head(x_BTD[:, :-1]), model.last_logits(x_BTD)[:, None]]
    found = [taps]
    for token_B, values in zip(rows.token_NB, others, strict=True):
        with collect(level, within, values) as taps:
            logits_BV, cache = model.decode(token_B, cache)
        logits.append(logits_BV[:, None])
        found.append(taps)
    joined = {path: rows.back(torch.cat([one[path] for one in found], dim=1)) for path in in_all(found)}
    return rows.back(torch.cat(logits, dim=1)), joined
