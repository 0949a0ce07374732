"""transformers as the oracles' reference: in float64 throughout, and what it computes under the oracle's names."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import modeling_rope_utils


class TorchInFloat64:
    """``torch`` for a module whose ``torch.float32`` is to mean float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def float32_islands_widened(*families: str) -> Iterator[pytest.MonkeyPatch]:
    """transformers computes norms, rotary tables, softmax and router in float32 whatever the model's dtype is.

    Its own code, with the dtype it names replaced, is a reference a billion times sharper than the float32 model.
    Gives the patch, for a test to add its own.
    """
    modules = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in families]
    with pytest.MonkeyPatch.context() as patch:
        for module in (*modules, modeling_rope_utils):
            patch.setattr(module, "torch", TorchInFloat64())
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield patch
        finally:
            torch.set_default_dtype(torch.float32)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def reference_forward(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What ``oracle_forward`` returns, from hooks: transformers' own last hidden state is post-norm."""
    B, T = inputs["input_ids"].shape
    mask_BT = inputs.get("attention_mask", np.ones((B, T), np.int64))
    positions = inputs.get("position_ids", np.maximum(mask_BT.cumsum(1) - 1, 0))
    text = getattr(model.model, "language_model", model.model)
    out: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(module, args, output):
            out[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_routing(layer: int):
        def hook(module, args, output):
            out[f"router_logits.{layer}"], out[f"routing.{layer}"] = (output[i].reshape(B, T, -1) for i in (0, 2))

        return hook

    with contextlib.ExitStack() as hooks, torch.no_grad():
        hooks.enter_context(text.embed_tokens.register_forward_hook(keep("hidden_states.0")))
        hooks.enter_context(text.norm.register_forward_hook(keep("final_hidden_state")))
        for number, layer in enumerate(text.layers, 1):
            hooks.enter_context(layer.register_forward_hook(keep(f"hidden_states.{number}")))
            if "Sparse" in type(layer.mlp).__name__:
                hooks.enter_context(layer.mlp.gate.register_forward_hook(keep_routing(number)))
        out["logits"] = model(
            input_ids=torch.from_numpy(inputs["input_ids"]),
            attention_mask=torch.from_numpy(mask_BT),
            position_ids=torch.from_numpy(positions),
            use_cache=False,
        ).logits
    return {name: value.numpy() for name, value in out.items()}


def distances(
    got: dict[str, np.ndarray], want: dict[str, np.ndarray], inputs: dict[str, np.ndarray]
) -> dict[str, float]:
    """Relative error of every tensor over the real tokens; experts have to be the same."""
    assert sorted(got) == sorted(want)
    real_BT = inputs.get("attention_mask", np.ones_like(inputs["input_ids"])) == 1
    found = {}
    for name in want:
        ours, theirs = got[name][real_BT], want[name][real_BT]
        if "routing" in name:
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
        else:
            found[name] = relative_error(ours, theirs)
    return found
