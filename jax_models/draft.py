"""The draft: a checkpoint's multi-token prediction, run with the embedding and the head of the model it drafts for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_models.adapter_room import RowAdapters
from jax_models.ambient import in_own_settings
from jax_models.batch import Batch
from jax_models.cache import Cache
from jax_models.layers.step import LayerCache, steps
from jax_models.layers.vision import Seen
from jax_models.taps import collect
from loaders.adapters.roster import AdapterOfRows
from loaders.events import version_of
from loaders.host.drafting import check_binding, check_drafted, shared_with
from loaders.host.inputs import ModelInputs
from loaders.host.speculation import SpeculationReport

if TYPE_CHECKING:
    from jax_models.model import Model
    from jax_models.programs import Programs, Weights


@dataclass(eq=False)
class Draft:
    """``mtp.*`` of one model, bound to a target. It owns no embedding and no head: the target's buffers serve both.

    Attributes:
        source: the model whose ``mtp.*`` these are.
        target: the model it drafts for; None: it cannot run.
        report: what it was worth in its last generation.
    """

    source: Model
    target: Model | None
    report: SpeculationReport | None = None

    @property
    def weights(self) -> Weights:
        """The target's weights with this draft's ``mtp``; every buffer is shared with its owner.

        Raises:
            RuntimeError: it is bound to no model, or weights of one of the two were given up.
        """
        if self.target is None:
            raise RuntimeError("the draft is bound to no model and has no embedding or head of its own. Call bind.")
        for model in (self.source, self.target):
            model.check_runnable()
        return {**self.target.weights, "mtp": self.source.weights["mtp"]}

    @property
    def shared(self) -> dict[str, str]:
        """What it reads of its target; see ``loaders.host.drafting``."""
        return shared_with(self.target)

    @property
    def mesh(self) -> Mesh | None:
        """Devices that it and its target lie on; None: one."""
        return self.source.mesh

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        *,
        hidden_states: Any = None,
        adapter: AdapterOfRows = None,
        **multimodal: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """Logits, float32 [B, T-1, V], and hidden states [B, T-1, D]; see ``Model.mtp_forward``."""
        given = {"hidden_states": hidden_states, "adapter": adapter, **multimodal}
        logits, drafted_BTD, _ = self.with_taps(input_ids, attention_mask, position_ids, **given)
        return logits, drafted_BTD

    @in_own_settings
    def with_taps(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        *,
        hidden_states: Any = None,
        adapter: AdapterOfRows = None,
        **multimodal: Any,
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """As calling the draft, and its intermediate values by checkpoint module path."""
        weights, target = self.weights, self.target
        assert target is not None

        def checked() -> tuple[ModelInputs, np.ndarray]:
            inputs = check_drafted(target, input_ids, attention_mask, position_ids, multimodal)
            return inputs, target.roster.rows(adapter, len(inputs.input_ids))

        def summary(found: tuple[ModelInputs, np.ndarray]) -> str:
            said = f"inputs {found[0].digest}, adapters of rows {found[1].tolist()}"
            return f"{said}, a draft of {version_of(self.source.events)}"

        inputs, slot_B = target.agreed("what the draft is called with", checked, summary)
        entry = inputs.input_ids
        if not target.stage.is_first:
            entry, _ = target.checked(None, attention_mask, position_ids, hidden_states, adapter=adapter)
        given = (weights, target.batch(inputs, entry), inputs.input_ids)
        return self.source.programs.draft.forward(*given, **target.of_slots(slot_B))

    def bind(self, target: Model) -> Draft:
        """The same draft for another model of its config.

        Raises:
            ValueError: see ``loaders.host.drafting.check_binding``.
        """
        apart = ["they are on different meshes"] if self.source.mesh != target.mesh else []
        check_binding(self.source, target, apart)
        return Draft(self.source, target)

    def unbind(self) -> Draft:
        """The same draft without a target: it holds nothing of one any more."""
        return Draft(self.source, None)


class DraftPrograms:
    """The compiled functions of speculative decoding, for models that were loaded with their draft."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self.forward = jax.jit(self._forward)
        self.prefill = jax.jit(self._prefill, donate_argnames="cache")
        self.verify = jax.jit(self._verify, **programs.appending)
        self.keep = jax.jit(self._keep, donate_argnames="cache", static_argnames="tokens")
        self.extend = jax.jit(self._extend, **programs.appending)
        self.step = jax.jit(self._step, **programs.appending)
        self.compact = jax.jit(self._compact, donate_argnames="cache")

    def _forward(
        self,
        weights: Weights,
        batch: Batch,
        ids_BT: jax.Array,
        adapters: RowAdapters | None = None,
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Draft logits [B, T-1, V] and hidden states [B, T-1, D]: row t of hidden state t and token t + 1. And taps.

        ``ids_BT``: the tokens, also where hidden states are what the stage reads.
        """
        programs = self._programs
        with programs.module(weights, adapters) as module:
            x_BTD, seen = programs.enter_seeing(module, batch)
            hidden_BTD, _ = module.decoder(x_BTD, batch.position_ids, batch.mask_BT, seen=seen)
            # what is shown is shown to the draft too
            next_embeds = module.embed(ids_BT[:, 1:]) if seen is None else x_BTD[:, 1:]
            is_pair = batch.mask_BT[:, 1:] & batch.mask_BT[:, :-1]
            step = self._steps(module, batch.position_ids[..., 1:], is_pair, 0, is_cached=False)
            with collect() as taps:
                drafted, _ = module.mtp(next_embeds, hidden_BTD[:, :-1], step)
            return module.head(drafted), drafted, taps

    def _prefill(
        self,
        weights: Weights,
        batch: Batch,
        cache: Cache,
        adapters: RowAdapters | None = None,
    ) -> tuple[jax.Array, jax.Array, Seen | None, Cache]:
        """As of a model without draft; also the final hidden states, [B, T, D], and what ``extend`` is to see."""
        programs = self._programs
        with programs.module(weights, adapters) as module:
            hidden_BTD, seen, cache = programs.read_into(module, batch, cache)
            ahead = None if seen is None else seen.ahead()
            return module.head(hidden_BTD[:, -1:])[:, 0], hidden_BTD, ahead, cache

    def _verify(
        self, weights: Weights, ids_BT: jax.Array, cache: Cache, adapters: RowAdapters | None = None
    ) -> tuple[jax.Array, jax.Array, dict[str, LayerCache], Cache]:
        """Logits [B, T, V] and hidden states after each of T tokens; how to undo some of them; and the cache."""
        slots_S, T = jnp.arange(cache.key_mask.shape[1]), ids_BT.shape[1]
        is_new_S = (slots_S >= cache.length) & (slots_S < cache.length + T)
        positions_BT = cache.position[:, None] + jnp.arange(T)
        key_mask_BS = cache.key_mask | is_new_S
        programs = self._programs
        with programs.module(weights, adapters) as module:
            x_BTD = programs.enter(module, ids_BT)
            hidden_BTD, cache = module.decoder(x_BTD, positions_BT, key_mask_BS, cache, keep_history=True)
            cache, history = cache.without_history()
            return module.head(hidden_BTD), hidden_BTD, history, programs.placed(cache)

    def _keep(self, history: dict[str, LayerCache], count_B: jax.Array, tokens: int, cache: Cache) -> Cache:
        """Of the ``tokens`` just verified, keep the first ``count_B`` of each row."""
        return self._programs.placed(cache.kept(history, count_B, tokens))

    def _extend(
        self,
        weights: Weights,
        next_ids_BT: jax.Array,
        hidden_BTD: jax.Array,
        positions_BT: jax.Array,
        last_B: jax.Array,
        seen: Seen | None,
        cache: Cache,
        adapters: RowAdapters | None = None,
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """The draft reads the tokens that came last, each with the hidden state before it.

        Args:
            weights: of target and draft.
            next_ids_BT: the token after each of the last T slots.
            hidden_BTD: the target's final hidden states of those slots.
            positions_BT: of ``next_ids_BT``; [3, B, T] of a prompt that shows something.
            last_B: the last real one of each row.
            seen: what the vision tower made of images among ``next_ids_BT``.
            cache: after those slots.
            adapters: of the target's rows.
        Returns:
            Its logits [B, V] and hidden state [B, 1, D] at ``last_B``, and the cache.
        """
        start = cache.length - next_ids_BT.shape[1]
        run = (positions_BT, cache.key_mask, start, last_B, cache)
        return self._draft(weights, adapters, next_ids_BT, hidden_BTD, *run, seen)

    def _step(
        self,
        weights: Weights,
        ids_B: jax.Array,
        hidden_B1D: jax.Array,
        offset: jax.Array,
        cache: Cache,
        adapters: RowAdapters | None = None,
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """One more guess, from the draft's own last state and token; ``offset``: guesses in the cache already."""
        slots_S = jnp.arange(cache.key_mask.shape[1])
        is_guess_S = (slots_S >= cache.length) & (slots_S <= cache.length + offset)
        positions_B1 = cache.position[:, None] + 1 + offset
        last_B = jnp.zeros_like(ids_B)
        key_mask_BS = cache.key_mask | is_guess_S
        ids_B1, start = ids_B[:, None], cache.length + offset
        return self._draft(weights, adapters, ids_B1, hidden_B1D, positions_B1, key_mask_BS, start, last_B, cache)

    def _draft(
        self,
        weights: Weights,
        adapters: RowAdapters | None,
        ids_BT: jax.Array,
        hidden_BTD: jax.Array,
        positions_BT: jax.Array,
        key_mask_BS: jax.Array,
        start: jax.Array,
        last_B: jax.Array,
        cache: Cache,
        seen: Seen | None = None,
    ) -> tuple[jax.Array, jax.Array, Cache]:
        programs = self._programs
        with programs.module(weights, adapters) as module:
            step = self._steps(module, positions_BT, key_mask_BS, start, is_cached=True)
            embeds_BTD = module.embed(ids_BT) if seen is None else module.embed(ids_BT, seen)
            drafted_BTD, kept = module.mtp(embeds_BTD, hidden_BTD, step, cache.layers["mtp"])
            hidden_B1D = jnp.take_along_axis(drafted_BTD, last_B[:, None, None], axis=1)
            cache = replace(cache, layers={**cache.layers, "mtp": kept})
            return module.head(hidden_B1D)[:, 0], hidden_B1D, programs.placed(cache)

    def _steps(
        self, module: Any, position_ids: jax.Array, key_mask_BS: jax.Array, start: jax.Array | int, *, is_cached: bool
    ) -> Any:
        length = position_ids.shape[-1]
        config = module.decoder.config
        return steps(config, [0], position_ids, key_mask_BS, start, length=length, is_cached=is_cached)[0]

    def _compact(self, cache: Cache) -> Cache:
        return self._programs.placed(cache.compacted())
