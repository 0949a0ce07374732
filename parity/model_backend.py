"""Our models under parity: run on a batch, looked into, handed values from elsewhere; whatever their backend, NumPy."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from loaders import Checkpoint
from loaders.adapters.updates import Adapter
from loaders.host.inputs import left_aligned
from loaders.host.multimodal import NAMES as MULTIMODAL
from loaders.host.multimodal import TYPES, check_inputs, placeholders, shown_of
from parity.backend import HEAD, BackendInfo, Inputs
from parity.backends import Framework


def trace_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Module path of a tap -> its name in a trace."""
    layers, path = range(checkpoint.config.num_hidden_layers), checkpoint.config.text_paths[0]
    names = {f"{path}.embed_tokens": "hidden_states.0", f"{path}.norm": "final_hidden_state"}
    names |= {f"{path}.layers.{layer}": f"hidden_states.{layer + 1}" for layer in layers}
    names |= {f"{path}.layers.{layer}.mlp.gate": f"routing.{layer + 1}" for layer in layers}
    return names | {"mtp.layers.0.mlp.gate": "mtp.routing.1"}


@dataclass(frozen=True)
class ModelBackend:
    """One of our models: a ``parity.Backend``, and a ``Tapped`` that can be looked into and handed values.

    Attributes:
        model: whole, of ``framework``.
        framework: where it lives.
        label: what to call it; None: as its framework.
        max_new_tokens: also generate so many, greedily.
        ignore_eos: go on after an end-of-sequence token.
        mtp: also run the model's draft, which it must have been loaded with.
        inject: values that take the place of what is computed, by path; see ``Model.with_taps``.
        decode: read so many last tokens of every row one at a time, from a cache; 0: all at once.
    Raises:
        ValueError: no number of tokens, or ``ignore_eos`` where none are generated.
    """

    model: Any
    framework: Framework
    label: str | None = None
    max_new_tokens: int | None = None
    ignore_eos: bool = False
    mtp: bool = False
    inject: Inputs | None = None
    decode: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}, expected at least 1, or none at all")
        if self.ignore_eos and self.max_new_tokens is None:
            raise ValueError("ignore_eos is of tokens that are generated: say how many, max_new_tokens")

    @property
    def name(self) -> str:
        """What to call it."""
        return self.label or self.framework.name

    @property
    def dtype(self) -> str:
        """What it computes in."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def info(self) -> BackendInfo:
        """What ran, and what of it besides the weights decides on what it computes."""
        model, dtype = self.model, self.dtype
        facts: dict[str, Any] = {"events": [dataclasses.asdict(event) for event in model.events]}
        if model.config.quantization is not None:
            facts["weight_only"] = not (model.quantizes_inputs or model.rounds_cache)
            facts["kernels"] = dict(Counter(model.kernels.values()))
        if self.decode:
            facts["decode"] = self.decode
        if self.max_new_tokens:
            facts |= {"max_new_tokens": self.max_new_tokens, "ignore_eos": self.ignore_eos}
        if (running := _running(model)) is not None and len(model.adapters) == 1 and model.roster.merged is None:
            facts["adapter"] = running.source
        return BackendInfo(
            name=self.framework.name,
            dtype=dtype,
            device=self.framework.device,
            versions=self.framework.versions(),
            # two runs of one checkpoint that differ in this computed different things
            precision=self.framework.precision(dtype) | _computed(model),
            checkpoint=str(model.checkpoint.source),
            facts=facts,
        )

    def run(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """What the model computes on ``inputs``.

        Raises:
            ValueError: bad inputs, or no draft.
        """
        model, host = self.model, self.framework.to_numpy
        with self.framework.scope():
            logits, taps = model.with_taps(**inputs, inject=self.inject, decode=self.decode)
            names = trace_names(model.checkpoint)
            tensors = {names[path]: host(value) for path, value in taps.items()}
            tensors["logits"] = host(logits)
            if self.mtp:
                drafted, hidden, taps = model.draft.with_taps(**inputs)
                tensors |= {"mtp.logits": host(drafted), "mtp.hidden_state": host(hidden)}
                drafts = {path: value for path, value in taps.items() if path.startswith("mtp.")}
                tensors |= {names[path]: host(value) for path, value in drafts.items()}
            if self.max_new_tokens:
                tensors |= _generated(model, self.framework, inputs, self.max_new_tokens, self.ignore_eos)
        return tensors

    def taps(
        self,
        inputs: Inputs,
        *,
        level: str = "layers",
        within: str | None = None,
        inject: Inputs | None = None,
    ) -> dict[str, np.ndarray]:
        """What the model computes, by path, float32 or integers; see ``Model.with_taps``. Logits are ``lm_head``."""
        with self.framework.scope():
            look = {"level": level, "within": within, "inject": inject, "decode": self.decode}
            logits, taps = self.model.with_taps(**inputs, **look)
        found = {path: self.framework.to_numpy(value) for path, value in taps.items()}
        return found | {HEAD: self.framework.to_numpy(logits)}

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every checkpoint tensor the model holds."""
        return iter(import_module(f"{self.framework.module.__name__}.weights").tensor_reader(self.model))


def _computed(model: Any) -> dict[str, Any]:
    """What of a model besides its weights decides on what it computes."""
    is_quantized = model.config.quantization is not None
    running = _running(model)
    rounded = {"quantized_inputs": model.quantizes_inputs, "rounded_cache": model.rounds_cache}
    return (rounded if is_quantized else {}) | {"adapter": None if running is None else running.digest}


def _running(model: Any) -> Adapter | None:
    """What rows run with where nobody says: the adapter that came last."""
    return next((one.adapter for one in reversed(model.adapters.values())), None)


def _generated(
    model: Any, backend: Framework, inputs: Mapping[str, np.ndarray], max_new_tokens: int, ignore_eos: bool
) -> dict[str, np.ndarray]:
    """Generated tokens, and how far the best logit led at each step (from one full forward over prompt and tokens)."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    shown = shown_of({name: inputs[name] for name in MULTIMODAL if name in inputs}, ids.shape)
    if (given := inputs.get("position_ids")) is not None:
        counted = check_inputs(model.config, ids, mask, given=shown)
        own = check_inputs(model.config, ids, mask, given, given=shown).position_ids
        if ((counted.position_ids != own) & counted.attention_mask).any():
            raise ValueError(
                "position_ids are given, and generation counts others. Leave them out, or record no generated tokens."
            )
    tokens = backend.to_numpy(model.generate(ids, mask, max_new_tokens, ignore_eos=ignore_eos, **shown)).astype(
        np.int64
    )
    prompt = check_inputs(model.config, ids, mask, given=shown, is_prompt=True)
    later = np.ones_like(tokens[:, :-1])
    grown = np.concatenate([prompt.input_ids, tokens[:, :-1]], axis=1)
    seen = np.concatenate([prompt.attention_mask, later.astype(bool)], axis=1)
    if shown:  # what is generated is text, also where it is a placeholder's number
        types, _ = placeholders(model.config.vision, ids, shown.get(TYPES))
        types = left_aligned(types, np.ones(ids.shape, bool) if mask is None else np.asarray(mask))
        shown |= {TYPES: np.concatenate([types, 0 * later], axis=1)}
    steps = backend.to_numpy(model(grown, seen, **shown))[:, prompt.input_ids.shape[1] - 1 :]
    best = np.sort(steps, axis=-1)
    return {"generated_ids": tokens, "generated_margins": best[..., -1] - best[..., -2]}
