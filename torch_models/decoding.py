"""What a model offers token by token: prefill and decode with a cache, generation, and the draft."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from loaders.adapters.roster import AdapterOfRows
from loaders.digest import digest_after
from loaders.events import version_of
from loaders.host.inputs import ModelInputs, bucket, check_next
from loaders.host.multimodal import check_inputs
from loaders.host.sampling import SamplingParams, asked_params, check_room
from loaders.host.speculation import positions_beyond
from torch_models import adapters as lora
from torch_models.cache import Cache
from torch_models.coordination import in_step
from torch_models.draft import Draft
from torch_models.generate import generate
from torch_models.host import on_host
from torch_models.layers.vision import Seen
from torch_models.one_version import of_one_version
from torch_models.precision import in_own_precision
from torch_models.speculative import generate_with_draft

if TYPE_CHECKING:
    from torch_models.model import Model


class Decoding:
    """Continuing prompts: base of ``torch_models.model.Model``."""

    @in_step
    @of_one_version
    @in_own_precision
    def prefill(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int = 16,
        adapter: AdapterOfRows = None,
        **multimodal: Any,
    ) -> tuple[torch.Tensor, Cache]:
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
        prompt = model.checked_prompt(input_ids, attention_mask, **multimodal)
        cache = model.cache_for(prompt, max_new_tokens, adapter)
        return model.prefill_into(prompt, cache), cache

    def cache_for(self, prompt: ModelInputs, max_new_tokens: int, adapter: AdapterOfRows) -> Cache:
        """An empty cache for a checked prompt and so many tokens more, whose rows run with these adapters."""
        model = self._model
        rows, length = prompt.input_ids.shape

        def slots() -> np.ndarray:
            check_room(max_new_tokens)
            return model.roster.rows(adapter, rows)

        def said(slot_B: np.ndarray) -> str:
            return f"room for {max_new_tokens} tokens, adapters of rows {slot_B.tolist()}"

        slot_B = model.agreed("what is asked for", slots, said)
        cache = model.empty_cache(rows, bucket(length + max_new_tokens))
        cache.adapter.copy_(model.long(slot_B))
        cache.content = "" if model.mesh is None else digest_after(prompt.digest, slot_B)
        return cache

    def checked_prompt(self, input_ids: Any, attention_mask: Any = None, **multimodal: Any) -> ModelInputs:
        """What ``prefill`` was given, checked, every row's real tokens at its end.

        Raises:
            ValueError: bad inputs, a row without tokens, or a pipeline stage.
            RuntimeError: the model must not run.
        """
        model = self._model

        def checked() -> ModelInputs:
            model.check_runnable()
            model.check_whole()
            prompt = (model.config, on_host(input_ids), on_host(attention_mask))
            given = {name: on_host(value) for name, value in multimodal.items()}
            return check_inputs(*prompt, given=given, has_tower=model.stage.has_tower, is_prompt=True)

        return model.agreed("the prompt", checked, lambda found: found.digest)

    def prefill_into(self, prompt: ModelInputs, cache: Cache) -> torch.Tensor:
        """Logits, float32 [B, V], of each row's next token; the cache, empty before, holds the prompt."""
        model = self._model
        with lora.of_cache(model, cache):
            x_BTD, _ = self.read_into(prompt, cache)
            return self.last_logits(x_BTD)

    def last_logits(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of each row's next token alone; a prompt's others would fill the memory."""
        return self._model.head(x_BTD[:, -1:])[:, 0]

    def read_into(self, prompt: ModelInputs, cache: Cache) -> tuple[torch.Tensor, Seen | None]:
        """Final hidden states of a prompt, [B, T, D], and what it shows; the cache, empty before, holds the prompt."""
        model = self._model
        filled = cache.with_room(prompt.input_ids.shape[1])
        filled.key_mask[:, : prompt.input_ids.shape[1]] = torch.from_numpy(prompt.attention_mask)
        seen = model.seen(prompt)
        x_BTD = model.entered(model.long(prompt.input_ids), seen)
        x_BTD = model.decoder(x_BTD, model.long(prompt.position_ids), filled.key_mask, filled, seen=seen)
        cache.position.copy_(model.long(positions_beyond(prompt)))  # an image takes fewer positions than tokens
        return x_BTD, seen

    @in_step
    @of_one_version
    @in_own_precision
    def decode(self, token_ids: Any, cache: Cache) -> tuple[torch.Tensor, Cache]:
        """Append one token a row: logits, float32 [B, V], without gradients, and the cache, written in place.

        Args:
            token_ids: integers [B], or [B, 1].
            cache: of ``prefill`` or of the last step.
        Raises:
            ValueError: the cache was computed with other weights, is full, or has other rows.
        """
        model = self._model

        def next_ids() -> np.ndarray:
            model.check_refusal()
            if not isinstance(cache, Cache):
                raise ValueError(f"cache is a {type(cache).__name__}, expected what prefill or the last step returned")
            return model.next_ids(token_ids, cache, rows=len(cache.position))

        def said(ids_B1: np.ndarray) -> str:
            return f"tokens {ids_B1[:, 0].tolist()} after {cache.content}"

        ids_B1 = model.agreed("what is appended", next_ids, said)
        with torch.inference_mode(), cache.written():  # on a CPU half of an operation's overhead is what autograd asks
            logits_BV = model.decode_step(model.long(ids_B1), cache.with_room(1))
        cache.content = cache.content and digest_after(cache.content, ids_B1)
        return logits_BV.clone(), cache  # which the caller may write to, outside of that mode too

    def next_ids(self, token_ids: Any, cache: Cache, *, rows: int) -> np.ndarray:
        """What ``decode`` was given, checked against the cache it will be appended to: int32 [B, 1]."""
        model = self._model
        if cache.stamp != model.weights_stamp():
            model.check_runnable()  # that it sleeps is what comes first; awake it is, where the stamp is the same
            raise ValueError(
                f"the cache holds keys and values of other weights or adapters (version {cache.version}; the model is"
                f" at {model.version}). Run prefill again."
            )
        ids_B1 = check_next(model.config, on_host(token_ids), rows=rows)
        if cache.length >= cache.capacity:
            raise ValueError(f"the cache is full at {cache.capacity} tokens. Give prefill a larger max_new_tokens.")
        return ids_B1

    def decode_step(self, ids_B1: torch.Tensor, cache: Cache) -> torch.Tensor:
        """One token a row, unchecked: logits, float32 [B, V]. What graphs capture: all it reads is on the device."""
        cache.key_mask.index_fill_(1, cache.slot[None], True)
        model = self._model
        with lora.of_cache(model, cache):
            x_B1D = model.decoder(model.embed(ids_B1), cache.position[:, None].clone(), cache.key_mask, cache)
            return self.last_logits(x_B1D)

    @in_step
    @of_one_version
    @in_own_precision
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
    ) -> torch.Tensor:
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
            graphs: decode by replaying captured graphs, kept for the next call; see ``torch_models.graphs``.
            draft: guesses tokens, and those that the model would have said are kept; ``draft.report`` says what it was
                worth. See ``torch_models.speculative``.
            draft_tokens: guesses in each round; 3 where there is a draft.
            adapter: of the rows, as for the model itself.
            multimodal: images and videos, likewise.
        Returns:
            int64 [B, N], N <= max_new_tokens: until every row has ended. A row that ended is filled with pad_token_id
            (or its end token when the config names none).
        Raises:
            ValueError: options out of range, bad inputs, a pipeline stage, or a draft of another model or version.
            FloatingPointError: logits are NaN or infinite.
            RuntimeError: a graph's tensors were moved since it was captured.
        """
        model = self._model
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        options |= {"seed": seed, "ignore_eos": ignore_eos}
        checked = partial(asked_params, draft, draft_tokens, model=model, kind=Draft, **options)

        def said(found: SamplingParams) -> str:
            return f"{found}, graphs={graphs}, {'no draft' if draft is None else version_of(draft.source.events)}"

        params = model.agreed("what is asked for", checked, said)
        if draft is not None and graphs:
            raise ValueError("graphs=True and a draft do not go together: graphs are captured of one token a row")
        prompt = (input_ids, attention_mask, params)
        if draft is None:
            return generate(model, *prompt, graphs=graphs, adapter=adapter, **multimodal)
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
    ) -> tuple[torch.Tensor, torch.Tensor]:
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
