"""Small adapters that show a bug, in PEFT's format, made from a checkpoint and a seed alone, without PEFT.

Both halves of every update are away from zero, and an update is about as large as the weight it is of: an adapter that
is left out, scaled wrongly or applied to a neighbour moves the logits by their own size.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from loaders import open_checkpoint
from loaders.adapters.config import AdapterConfig, read_adapter_config
from loaders.adapters.sites import Site, Sites, sites_of

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
TABLES = ("embed_tokens", "lm_head")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_SIZE = 0.7  # of an update whose scaling is one, against a weight drawn with a gain of one
_PREFIX = "base_model.model."


def make_adapter(
    checkpoint: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float = 6,
    targets: str | Sequence[str] = DENSE,
    parameters: Sequence[str] = (),
    whole: Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    is_zero: bool = False,
    base_layer: bool = False,
    text_path: str | None = None,
) -> Path:
    """Write an adapter for ``checkpoint`` to ``directory``.

    Args:
        checkpoint: what it is for; unquantised or not, the same adapter comes out.
        directory: new or empty.
        seed: another seed is another adapter of the same shapes.
        rank: ``r``.
        alpha: ``lora_alpha``.
        targets: ``target_modules``.
        parameters: ``target_parameters``.
        whole: ``modules_to_save``.
        rank_pattern: as in adapter_config.json.
        alpha_pattern: likewise.
        use_rslora: likewise.
        is_zero: every B is zero: an adapter that has not learned anything.
        base_layer: with the base's own table beside every update of embedding or head, as PEFT saves them.
        text_path: path of the text model in its names; None: as in the checkpoint's config.
    """
    opened = open_checkpoint(checkpoint)
    config = opened.config
    document: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(checkpoint),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": use_rslora,
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": dict(alpha_pattern or {}),
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "target_parameters": list(parameters) or None,
        "modules_to_save": list(whole) or None,
    }
    read, problems = read_adapter_config(document)
    assert not problems, problems
    assert read is not None
    ours = config.text_paths[0]
    drawing = _Drawing(read, sites_of(config), seed, is_zero, (ours, text_path or ours))
    drawn = drawing.tensors() | (drawing.tables(opened.read) if base_layer else {})
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(document, indent=2))
    save_file(drawn, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


class _Drawing:
    def __init__(
        self, config: AdapterConfig, sites: Sites, seed: int, is_zero: bool, spelling: tuple[str, str]
    ) -> None:
        self.config, self.sites, self.seed, self.is_zero, self.spelling = config, sites, seed, is_zero, spelling

    def tensors(self) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for site in self.sites.low_rank.values():
            name = self._spelled(site.path)
            if site.kind == "experts":
                found |= self._experts(site, name) if self.config.targets_parameter(name) else {}
            elif (target := self.config.target(name, is_plain=site.is_plain)) is not None:
                found |= self._low_rank(site, name, target)
        for tensor, shape in self.sites.whole.items():
            name = self._spelled(tensor)
            if self.config.saves(name):
                size = 1.5 / np.sqrt(shape[-1]) if len(shape) == 2 else 0.3
                centre = 1.0 if len(shape) == 1 else 0.0
                found[_PREFIX + name] = (centre + size * self._draw(name, shape)).astype(np.float32)
        return found

    def tables(self, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
        """Tables that have an update, as they are in the base."""
        adapted = [site for site in self.sites.low_rank.values() if site.kind == "embedding" or site.is_head]
        names = {self._spelled(site.path): site.parameter for site in adapted}
        return {
            f"{_PREFIX}{name}.base_layer.weight": read(parameter)
            for name, parameter in names.items()
            if self.config.targets(name, is_plain=False)
        }

    def _low_rank(self, site: Site, name: str, target: str) -> dict[str, np.ndarray]:
        """``target``: by which of its names the module is, see ``loaders.adapters.config``."""
        rank, (out, inner) = self.config.rank(target), site.shape
        is_table = site.kind == "embedding" and target == name
        if site.kind == "embedding" and not is_table:
            out, inner = inner, out
        halves = ("lora_embedding_A", "lora_embedding_B") if is_table else ("lora_A.weight", "lora_B.weight")
        a = self._draw(f"{name}.A", (rank, inner)) / (1.0 if is_table else np.sqrt(inner))
        b = self._draw(f"{name}.B", (out, rank)) * (_SIZE / np.sqrt(rank)) * (not self.is_zero)
        return {f"{_PREFIX}{name}.{half}": x.astype(np.float32) for half, x in zip(halves, (a, b), strict=True)}

    def _experts(self, site: Site, name: str) -> dict[str, np.ndarray]:
        """In the layout of PEFT's ParamWrapper: A is [E * r, in] by expert, B is [out, r * E] by rank."""
        module, _, _ = name.rpartition(".")
        stacks = [path for path in self.sites.low_rank if path.rpartition(".")[0] == site.module]
        named = [path for path in stacks if self.config.targets_parameter(self._spelled(path))]
        wrapped = module + ".base_layer" * (len(named) - 1 - named.index(site.path))
        rank, (out, inner), E = self.config.rank(name), site.shape, site.lead[0]
        parts = int(np.prod(site.lead[1:]))
        a = self._draw(f"{name}.A", (rank * E, inner)) / np.sqrt(inner)
        b = self._draw(f"{name}.B", (parts * out, rank * E)) * (_SIZE / np.sqrt(rank)) * (not self.is_zero)
        return {
            f"{_PREFIX}{wrapped}.lora_A.weight": a.astype(np.float32),
            f"{_PREFIX}{wrapped}.lora_B.weight": b.astype(np.float32),
        }

    def _spelled(self, name: str) -> str:
        ours, theirs = self.spelling
        return theirs + name.removeprefix(ours) if name.startswith(f"{ours}.") else name

    def _draw(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        plain = name.replace("language_model.", "")  # one adapter, however its model is spelled
        seed = hashlib.sha256(f"adapter\n{self.seed}\n{plain}".encode()).digest()
        return np.random.default_rng(list(seed)).standard_normal(shape)
