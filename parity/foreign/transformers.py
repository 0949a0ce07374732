"""A transformers model as a ``parity.Backend``: hidden states where a trace has them, weights as it would save them.

Its own ``output_hidden_states`` will not do: there the last one is after the final norm, and what Qwen3-VL adds between
layers comes too early. Here hooks take what each decoder layer is given.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from loaders import open_checkpoint
from parity.backend import BackendInfo, Inputs
from parity.foreign.torch_module import INPUT, TorchModule


@dataclass(frozen=True)
class TransformersModel:
    """A causal model of transformers, alone or inside a multimodal one.

    Attributes:
        model: in eval mode; anything with ``get_decoder()`` whose result has ``layers`` and ``norm``.
        checkpoint: where its weights are from, for the reader.
        knows_weights: whether ``weights`` may write the model to a temporary directory, whole, to learn what it holds
            under checkpoint names; False where that is too much, or where it saves another layout than was published
            (experts of Qwen3-VL). What was published in float32 (``A_log``) it holds in its own dtype, and another
            root than the checkpoint says so.
    """

    model: Any
    checkpoint: str = ""
    knows_weights: bool = True

    @classmethod
    def load(cls, uri: str | os.PathLike[str], *, dtype: str | None = None, device: str = "cpu") -> TransformersModel:
        """Load a checkpoint directory with the class that its config.json names. Needs transformers.

        Raises:
            ValueError: it left weights of the model uninitialised.
        """
        import transformers

        name = open_checkpoint(uri).config_document["architectures"][0]
        kind = getattr(transformers, name)
        found, report = kind.from_pretrained(uri, dtype=dtype or "auto", output_loading_info=True)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{uri} lacks {', '.join(missing)}: {name} would run with random weights there")
        return cls(found.to(device).eval(), str(uri))

    @property
    def info(self) -> BackendInfo:
        return self._observed.info

    def run(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """What the model computes on ``inputs``, positions counted over real tokens wherever padding is."""
        return self._observed.run(dict(inputs) | self._positions(inputs))

    def weights(self) -> Iterator[tuple[str, np.ndarray]] | None:
        """What ``save_pretrained`` would write."""
        return self._saved() if self.knows_weights else None

    def _saved(self) -> Iterator[tuple[str, np.ndarray]]:
        with tempfile.TemporaryDirectory(prefix="weights-") as directory:
            self.model.save_pretrained(directory)
            yield from open_checkpoint(directory).stream()

    def _positions(self, inputs: Inputs) -> dict[str, np.ndarray]:
        mask = inputs.get("attention_mask")
        if mask is None or "position_ids" in inputs or hasattr(self.model.config, "vision_config"):
            return {}  # a multimodal model counts by itself, in three axes
        return {"position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0)}

    @cached_property
    def _observed(self) -> TorchModule:
        decoder = self.model.get_decoder()
        path = next(path for path, module in self.model.named_modules() if module is decoder)
        layers = range(len(decoder.layers))
        # the stream after a layer is what the next one is given: in between, Qwen3-VL adds deepstack features
        taps = {f"{path}.layers.{layer}{INPUT}": f"hidden_states.{layer}" for layer in layers}
        taps |= {f"{path}.norm{INPUT}": f"hidden_states.{len(layers)}", f"{path}.norm": "final_hidden_state"}
        routers = [i for i in layers if hasattr(getattr(decoder.layers[i], "mlp", None), "experts")]
        taps |= {f"{path}.layers.{layer}.mlp.gate": f"routing.{layer + 1}" for layer in routers}
        return _Observed(
            module=self.model,
            taps=taps,
            name="transformers",
            checkpoint=self.checkpoint,
            picks={f"routing.{layer + 1}": _chosen for layer in routers},
        )


class _Observed(TorchModule):
    @property
    def info(self) -> BackendInfo:
        info = super().info
        return replace(info, versions={**info.versions, "transformers": version("transformers")})


def _chosen(out: Any, sizes: tuple[int, int]) -> torch.Tensor:
    """Of a router's result the experts it chose, [B, T, X]."""
    found = [tensor for tensor in out if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point()]
    if len(found) != 1:
        raise TypeError(f"a router returned {len(found)} tensors of integers, expected the chosen experts alone")
    return found[0].reshape(*sizes, -1)
