"""Run one of our models on a batch and write down what it computed."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from loaders import Checkpoint, open_checkpoint
from loaders.inputs import left_aligned
from loaders.multimodal import NAMES as MULTIMODAL
from loaders.multimodal import TYPES, check_inputs, placeholders, shown_of
from parity.backend import BackendInfo, Inputs, record_backend
from parity.backends import Framework
from parity.trace import Trace
from parity.zoo import prompts
from parity.zoo_pictures import pictures

INPUTS = ("input_ids", "attention_mask", "position_ids", *MULTIMODAL)


def read_inputs(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Model inputs from a safetensors file.

    Raises:
        ValueError: not safetensors, no ``input_ids``, or a tensor that is not a model input.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        inputs = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    unknown = sorted(set(inputs) - set(INPUTS))
    if "input_ids" not in inputs or unknown:
        raise ValueError(f"{path} holds {sorted(inputs)}, expected input_ids and nothing beside {', '.join(INPUTS)}")
    return inputs


def default_inputs(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Three rows of 96, 72 and 48 tokens, long enough for a rotary bug to show.

    The second is padded on the right, the third on the left: behind a row's end nothing looks at padding, before its
    start everything would that does not heed the mask.
    A model that sees is shown images and a video in two of them.
    """
    make = prompts if checkpoint.config.vision is None else pictures
    return make(checkpoint.config, rows=3, tokens=96, padding="both")


def trace_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Module path of a tap -> its name in a trace."""
    layers, path = range(checkpoint.config.num_hidden_layers), checkpoint.config.text_paths[0]
    names = {f"{path}.embed_tokens": "hidden_states.0", f"{path}.norm": "final_hidden_state"}
    names |= {f"{path}.layers.{layer}": f"hidden_states.{layer + 1}" for layer in layers}
    names |= {f"{path}.layers.{layer}.mlp.gate": f"routing.{layer + 1}" for layer in layers}
    return names | {"mtp.layers.0.mlp.gate": "mtp.routing.1"}


@dataclass(frozen=True)
class ModelBackend:
    """One of our models as a ``parity.Backend``.

    Attributes:
        model: whole, of ``framework``.
        framework: where it lives.
        max_new_tokens: also generate so many, greedily.
        ignore_eos: go on after an end-of-sequence token.
        mtp: also run the model's draft, which it must have been loaded with.
        inject: values that take the place of what is computed, by path; see ``Model.with_taps``.
    """

    model: Any
    framework: Framework
    max_new_tokens: int | None = None
    ignore_eos: bool = False
    mtp: bool = False
    inject: Inputs | None = None

    @property
    def info(self) -> BackendInfo:
        """What ran, and what of it besides the weights decides on what it computes."""
        model, dtype = self.model, str(self.model.dtype).removeprefix("torch.")
        facts: dict[str, Any] = {"events": [dataclasses.asdict(event) for event in model.events]}
        if model.config.quantization is not None:
            facts["weight_only"] = not (model.quantizes_inputs or model.rounds_cache)
            facts["kernels"] = dict(Counter(model.kernels.values()))
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
            logits, taps = model.with_taps(**inputs, inject=self.inject)
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

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every checkpoint tensor the model holds."""
        return iter(import_module(f"{self.framework.module.__name__}.weights").tensor_reader(self.model))


def record_model(model: Any, backend: Framework, inputs: Inputs, **options: Any) -> Trace:
    """What a live model computes on ``inputs``; options are those of ``ModelBackend``.

    Raises:
        ValueError: bad inputs, or no draft.
    """
    return record_backend(ModelBackend(model, backend, **options), inputs)


def record(
    uri: str | os.PathLike[str],
    backend: Framework,
    inputs: Mapping[str, np.ndarray] | None = None,
    *,
    dtype: str | None = None,
    reload: str | os.PathLike[str] | None = None,
    max_new_tokens: int | None = None,
    ignore_eos: bool = False,
    mtp: bool = False,
    weight_only: bool = False,
    adapter: str | os.PathLike[str] | None = None,
) -> Trace:
    """Load a checkpoint, optionally reload another over it, and record. ``inputs`` default to ``default_inputs``.

    ``adapter``: attach this one, before the reload. ``weight_only``: whatever the checkpoint says, neither inputs of
    quantised layers nor keys and values are rounded.

    Raises:
        ValueError: ``weight_only`` for a checkpoint that is not quantised.
    """
    if weight_only and open_checkpoint(uri).config.quantization is None:
        raise ValueError(f"--weight-only: {uri} is not quantised, so there is nothing to switch off. Leave it out.")
    model = backend.load(uri, dtype=dtype, mtp=mtp, weight_only=weight_only)
    if adapter is not None:
        with backend.scope():
            model = model.attach_lora(adapter)
    if reload is not None:
        with backend.scope():
            model = model.update_weights_from_disk(reload)
    given = default_inputs(model.checkpoint) if inputs is None else inputs
    return record_model(model, backend, given, max_new_tokens=max_new_tokens, ignore_eos=ignore_eos, mtp=mtp)


def _computed(model: Any) -> dict[str, Any]:
    """What of a model besides its weights decides on what it computes."""
    is_quantized = model.config.quantization is not None
    adapters = {name: one.adapter.digest for name, one in model.adapters.items()}
    rounded = {"quantized_inputs": model.quantizes_inputs, "rounded_cache": model.rounds_cache}
    return (rounded if is_quantized else {}) | ({"adapters": adapters} if adapters else {})


def _generated(
    model: Any, backend: Framework, inputs: Mapping[str, np.ndarray], max_new_tokens: int, ignore_eos: bool
) -> dict[str, np.ndarray]:
    """Generated tokens, and how far the best logit led at each step (from one full forward over prompt and tokens)."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    shown = shown_of({name: inputs[name] for name in MULTIMODAL if name in inputs}, ids.shape)
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
