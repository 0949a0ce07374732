"""What a model offers token by token: prefill and decode with a cache, generation, and the draft."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np

from jax_models.ambient import in_own_settings
from jax_models.cache import VersionedCache
from jax_models.draft import Draft
from jax_models.generate import generate
from jax_models.processes import processes_of
from jax_models.speculative import generate_with_draft
from loaders.adapters.roster import AdapterOfRows
from loaders.digest import digest_after
from loaders.events import version_of
from loaders.host.inputs import ModelInputs, bucket, check_next
from loaders.host.multimodal import check_inputs
from loaders.host.sampling import SamplingParams, asked_params, check_room

if TYPE_CHECKING:
    from jax_models.model import Model


class Decoding:
    """Continuing prompts: base of ``jax_models.model.Model``."""

    @in_own_settings
    def prefill(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int = 16,
        adapter: AdapterOfRows = None,
        **multimodal: Any,
    ) -> tuple[jax.Array, VersionedCache]:
        """Start a ragged batch: logits, float32 [B, V], of each row's next token, and the cache to go on from.

        Args:
            input_ids: integers [B, T].
            attention_mask: [B, T], padding on either side.
            max_new_tokens: how many tokens a row may be continued by; room for at least so many is made.
            adapter: of the rows, as for the model itself; ``decode`` goes on with it.
            multimodal: as for the model itself.
        Returns:
            The logits, and the cache with the prompt in it.
        Raises:
            ValueError: bad inputs, a row without tokens, or a pipeline stage (stages pass hidden states instead).
        """
        model = self._model
        checked = model.checked_prompt(input_ids, attention_mask, **multimodal)
        cache = model.cache_for(checked, max_new_tokens, adapter)
        given = (model.weights, model.batch(checked))
        logits_BV, arrays = model.programs.prefill(*given, cache=cache.arrays, **model.of_slots(cache.slot))
        return logits_BV, dataclasses.replace(cache, arrays=arrays)

    def cache_for(self, prompt: ModelInputs, max_new_tokens: int, adapter: AdapterOfRows) -> VersionedCache:
        """An empty cache for a checked prompt and so many tokens more, whose rows run with these adapters."""
        model = self._model
        rows, length = prompt.input_ids.shape

        def slots() -> np.ndarray:
            check_room(max_new_tokens)
            return model.roster.rows(adapter, rows)

        def said(slot_B: np.ndarray) -> str:
            return f"room for {max_new_tokens} tokens, adapters of rows {slot_B.tolist()}"

        slot_B = model.agreed("what is asked for", slots, said)
        arrays = model.programs.empty_cache(rows=rows, capacity=bucket(length + max_new_tokens))
        content = digest_after(prompt.digest, slot_B) if len(processes_of(model.mesh)) > 1 else ""
        return VersionedCache(arrays, model.version, model.weights_id, slot_B, content)

    def checked_prompt(self, input_ids: Any, attention_mask: Any = None, **multimodal: Any) -> ModelInputs:
        """What ``prefill`` was given, checked, every row's real tokens at its end, as long as programs are made for.

        Raises:
            ValueError: bad inputs, a row without tokens, or a pipeline stage.
        """
        model = self._model

        def checked() -> ModelInputs:
            model.check_runnable()
            model.check_whole()
            prompt, given = (model.config, input_ids, attention_mask), multimodal
            return check_inputs(*prompt, given=given, has_tower=model.stage.has_tower, is_prompt=True)

        prompt = model.agreed("the prompt", checked, lambda found: found.digest)
        return prompt.padded_to(bucket(prompt.input_ids.shape[1]))

    @in_own_settings
    def decode(self, token_ids: Any, cache: VersionedCache) -> tuple[jax.Array, VersionedCache]:
        """Append one token a row: logits, float32 [B, V], and the cache that replaces the one given (it is donated).

        Args:
            token_ids: integers [B], or [B, 1].
            cache: of ``prefill`` or of the last step.
        Raises:
            ValueError: the cache was computed with other weights, was given to a step before, is full or has other
                rows.
        """
        model = self._model

        def said(ids_B1: np.ndarray) -> str:
            return f"tokens {ids_B1[:, 0].tolist()} after {cache.content}"

        ids_B1 = model.agreed("what is appended", partial(model.next_ids, token_ids, cache), said)
        return model.decode_step(ids_B1, cache)

    def decode_step(self, ids_B1: np.ndarray, cache: VersionedCache) -> tuple[jax.Array, VersionedCache]:
        """As ``decode``, of tokens that were checked and are the same on all processes: int32 [B, 1]."""
        model = self._model
        try:
            logits_BV, arrays = model.programs.decode(
                model.weights, ids_B1, cache=cache.arrays, **model.of_slots(cache.slot)
            )
        except RuntimeError:
            model.check_runnable()  # an update that failed may have given up others than the one that was looked at
            raise
        content = cache.content and digest_after(cache.content, ids_B1)
        return logits_BV, dataclasses.replace(cache, arrays=arrays, content=content)

    def next_ids(self, token_ids: Any, cache: VersionedCache) -> np.ndarray:
        """What ``decode`` was given, checked against the cache it will be appended to: int32 [B, 1]."""
        model = self._model
        model.check_runnable(is_step=True)
        if not isinstance(cache, VersionedCache):
            raise ValueError(f"cache is a {type(cache).__name__}, expected what prefill or the last step returned")
        if cache.is_spent:
            raise ValueError(
                "the cache was given to a step before, which wrote in its memory. Take what that returned."
            )
        if cache.weights_id is not model.weights_id:
            raise ValueError(
                f"the cache holds keys and values of other weights or adapters (version {cache.version}; the model is"
                f" at {model.version}). Run prefill again."
            )
        ids_B1 = check_next(model.config, token_ids, rows=cache.arrays.position.shape[0])
        if int(cache.arrays.length) >= cache.capacity:
            raise ValueError(f"the cache is full at {cache.capacity} tokens. Give prefill a larger max_new_tokens.")
        return ids_B1

    @in_own_settings
    def generate(
        self,
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
        draft: Draft | None = None,
        draft_tokens: int | None = None,
        adapter: AdapterOfRows = None,
        **multimodal: Any,
    ) -> jax.Array:
        """Continue each row of a batch of prompts of different lengths.

        A row's tokens do not depend on the other rows, except that what is sampled depends on the batch's shape. Of
        generation_config.json only the end and pad tokens are used: options are those given here, and there are no
        penalties.

        Args:
            input_ids: integers [B, T].
            attention_mask: [B, T], padding on either side.
            max_new_tokens: at most so many per row.
            temperature: 0 = the best token (the lowest id among equals); else the softmax temperature.
            top_k: sample among the best k only.
            top_p: sample among the best tokens that together reach this probability, in (0, 1].
            seed: of the sampling, 0 to 2**63 - 1; ignored at temperature 0.
            ignore_eos: go on after an end-of-sequence token.
            graphs: refused; JAX has no need of them, for every step is one compiled program already.
            draft: guesses tokens, and those that the model would have said are kept; ``draft.report`` says what it was
                worth. See ``jax_models.speculative``.
            draft_tokens: guesses in each round; 3 where there is a draft.
            adapter: of the rows, as for the model itself.
            multimodal: images and videos, likewise.
        Returns:
            int32 [B, N], N <= max_new_tokens: until every row has ended. A row that ended is filled with pad_token_id
            (or its end token when the config names none).
        Raises:
            ValueError: options out of range, bad inputs, a pipeline stage, or a draft of another model or version.
            FloatingPointError: logits are NaN or infinite.
        """
        model = self._model
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        options |= {"seed": seed, "ignore_eos": ignore_eos}

        def checked() -> SamplingParams:  # by all processes together, also where one alone asks for what there is not
            if graphs:
                raise ValueError("graphs=True is torch's: here every step is one compiled program already. Drop it.")
            return asked_params(draft, draft_tokens, model=model, kind=Draft, **options)

        def said(found: SamplingParams) -> str:
            return f"{found}, {'no draft' if draft is None else version_of(draft.source.events)}"

        params = model.agreed("what is asked for", checked, said)
        prompt = (input_ids, attention_mask, params)
        if draft is None:
            return generate(model, *prompt, adapter=adapter, **multimodal)
        tokens, draft.report = generate_with_draft(model, *prompt, draft=draft, adapter=adapter, **multimodal)
        return tokens

    @property
    def draft(self) -> Draft:
        """The checkpoint's multi-token prediction, bound to this model.

        Raises:
            ValueError: the model was loaded without it, or this stage does not hold it.
        """
        model = self._model
        if not model.stage.has_draft:
            raise ValueError("this model holds no draft: load it with mtp=True, and of a pipeline take the last stage")
        return Draft(model, model)

    def mtp_forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        *,
        hidden_states: Any = None,
        adapter: AdapterOfRows = None,
        **multimodal: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """What the draft says of every token but the first; arguments as for the model itself.

        A last stage of several takes ``hidden_states`` beside ``input_ids``.

        Returns:
            Logits, float32 [B, T-1, V], and hidden states [B, T-1, D]: row t from the model's final hidden state at t
            and the token at t + 1.
        """
        model = self._model
        given = {"hidden_states": hidden_states, "adapter": adapter, **multimodal}
        return model.draft(input_ids, attention_mask, position_ids, **given)

    def check_whole(self) -> None:
        """Raises ValueError on a pipeline stage."""
        model = self._model
        if model.stage.count > 1:
            which = f"stage {model.stage.index} of {model.stage.count}"
            raise ValueError(
                f"this takes the whole model, and this is {which}. Load it without stage=, or call each stage with what"
                " the one before returned (hidden_states=)."
            )

    @property
    def _model(self) -> Model:
        return cast("Model", self)
