"""What a model computes while it reads rows as generation does: a prompt into a cache, then token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jax_models.cache import Cache
from jax_models.taps import Level, collect
from loaders.adapters.roster import AdapterOfRows
from loaders.host.stepwise import Stepwise, in_all

if TYPE_CHECKING:
    from jax_models.adapter_room import RowAdapters
    from jax_models.batch import Batch
    from jax_models.model import Model
    from jax_models.programs import Programs, Weights

Values = Mapping[str, jax.Array]


def read_stepwise(
    model: Model, rows: Stepwise, *, adapter: AdapterOfRows, level: Level, within: str | None, inject: Values | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits, float32 [B, T, V], and taps by path, [B, T, ...]: of the prompts as prefill computes them, then of steps.

    Arguments are those of ``Model.with_taps``.
    """
    prompt = model.checked_prompt(rows.input_ids, rows.attention_mask, **rows.multimodal)
    extra = prompt.input_ids.shape[1] - rows.input_ids.shape[1]
    cache = model.cache_for(prompt, len(rows.token_NB), adapter)
    of_rows = model.of_slots(cache.slot)
    first, *others = rows.handed(inject)
    look = {"level": level, "within": within}
    padded = {path: jnp.pad(x, [(0, 0), (extra, 0)] + [(0, 0)] * (x.ndim - 2)) for path, x in first.items()}
    programs, given = model.programs.stepwise, (model.weights, model.batch(prompt))
    logits_BTV, arrays, taps = programs.prefill(*given, cache=cache.arrays, inject=padded, **of_rows, **look)
    logits, found = [logits_BTV[:, extra:]], [{path: value[:, extra:] for path, value in taps.items()}]
    for token_B, values in zip(rows.token_NB, others, strict=True):
        cache = dataclasses.replace(cache, arrays=arrays)
        ids_B1 = model.next_ids(token_B, cache)
        logits_BV, arrays, taps = programs.decode(
            model.weights, ids_B1, cache=cache.arrays, inject=values, **of_rows, **look
        )
        logits.append(logits_BV[:, None])
        found.append(taps)
    joined = {path: rows.back(jnp.concatenate([one[path] for one in found], axis=1)) for path in in_all(found)}
    return rows.back(jnp.concatenate(logits, axis=1)), joined


class StepwisePrograms:
    """Prefill and decode of a whole model as ``Programs`` has them, which also return what taps found."""

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        static = ("level", "within")
        self.prefill = jax.jit(self._prefill, donate_argnames="cache", static_argnames=static)
        self.decode = jax.jit(self._decode, static_argnames=static, **programs.appending)

    def _prefill(
        self,
        weights: Weights,
        batch: Batch,
        cache: Cache,
        adapters: RowAdapters | None = None,
        level: Level = "layers",
        within: str | None = None,
        inject: Values | None = None,
    ) -> tuple[jax.Array, Cache, dict[str, jax.Array]]:
        """Logits of all tokens, [B, T, V]: those of the last as prefill has them."""
        programs = self.programs
        with collect(level, within, inject) as taps, programs.module(weights, adapters) as module:
            x_BTD, _, cache = programs.read_into(module, batch, cache)
            last_B1V = programs.last_logits(module, x_BTD)[:, None]
            return jnp.concatenate([module.head(x_BTD[:, :-1]), last_B1V], axis=1), cache, taps

    def _decode(
        self,
        weights: Weights,
        ids_B1: jax.Array,
        cache: Cache,
        adapters: RowAdapters | None = None,
        level: Level = "layers",
        within: str | None = None,
        inject: Values | None = None,
    ) -> tuple[jax.Array, Cache, dict[str, jax.Array]]:
        """One token a row: logits, [B, V]."""
        with collect(level, within, inject) as taps:
            logits_BV, cache = self.programs.decode_step(weights, ids_B1, cache, adapters)
        return logits_BV, cache, taps
