"""NVFP4 checkpoints of sensitised models, written by the exporters themselves; made once a session."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from exporters import compressed_tensors_checkpoint, modelopt_checkpoint

from parity.zoo import make_checkpoint

# in-features are multiples of 16; nothing else is even where it can be odd
_TEXT = {"hidden_size": 48, "head_dim": 16, "num_hidden_layers": 2, "eos_token_id": None}
_HYBRID = {**_TEXT, "layer_types": ["linear_attention", "full_attention"], "linear_value_head_dim": 8}
_EXPERTS = {"moe_intermediate_size": 48, "num_experts": 5}
KINDS = {
    "qwen3": ("qwen3", {**_TEXT, "intermediate_size": 80}),
    "qwen3_moe": ("qwen3-moe", {**_TEXT, **_EXPERTS, "intermediate_size": 80, "mlp_only_layers": []}),
    "qwen3_5": ("qwen3_5", {**_HYBRID, "intermediate_size": 80}),
    "qwen3_5_moe": ("qwen3_5-moe", {**_HYBRID, **_EXPERTS, "shared_expert_intermediate_size": 32}),
}
WRITERS = ("modelopt w4a4", "modelopt w4a16", "compressed-tensors w4a4", "compressed-tensors w4a16")


class Exports:
    """Checkpoints by kind, writer and seed, each made when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[tuple[str, str, int], Path] = {}

    def plain(self, kind: str, seed: int = 0) -> Path:
        """What the exporters are given."""
        name, sizes = KINDS[kind]
        return self._once((kind, "plain", seed), lambda path: make_checkpoint(name, path, seed=seed, **sizes))

    def __call__(self, kind: str, writer: str, seed: int = 0) -> Path:
        library, _, recipe = writer.partition(" ")

        def write(path: Path) -> Path:
            model = self._model(kind, seed)
            if library == "modelopt":
                return modelopt_checkpoint(path, model, recipe=recipe)
            return compressed_tensors_checkpoint(path, model, activations=recipe == "w4a4")

        return self._once((kind, writer, seed), write)

    def _once(self, key, make):
        if key not in self._made:
            self._made[key] = make(self.root / "-".join(map(str, key)).replace(" ", "-"))
        return self._made[key]

    def _model(self, kind: str, seed: int):
        model = transformers.AutoModelForCausalLM.from_pretrained(self.plain(kind, seed), dtype=torch.float32)
        model.config.architectures, model.config.dtype = [type(model).__name__], torch.float32
        return model.eval()
