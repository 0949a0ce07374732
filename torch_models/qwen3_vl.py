"""Qwen3-VL, dense and mixture of experts: Qwen3 with a vision tower. Module paths spell the tensors' names."""

from __future__ import annotations

import torch
from torch import nn

from loaders.qwen3_vl import Qwen3VLConfig
from loaders.stage import Stage
from torch_models.layers.decoder import Decoder
from torch_models.layers.linear import Linear
from torch_models.layers.norm import RMSNorm
from torch_models.layers.step import Entry
from torch_models.layers.vision import Seen, VisionTower
from torch_models.model import Model
from torch_models.qwen3 import DecoderLayer, Qwen3ForCausalLM


class Qwen3VLModel(nn.Module):
    """The vision tower, where it is, and the text model."""

    def __init__(self, config: Qwen3VLConfig, stage: Stage, language_model: Decoder) -> None:
        super().__init__()
        if config.vision is not None and stage.has_tower:
            self.visual = VisionTower(config.vision)
        self.language_model = language_model


class Qwen3VLForConditionalGeneration(Model):
    """The model and its head. Serves Qwen3VLMoeForConditionalGeneration too: a layer asks ``config.is_sparse``."""

    config: Qwen3VLConfig
    model: Qwen3VLModel

    def __init__(self, config: Qwen3VLConfig, stage: Stage, dtype: torch.dtype) -> None:
        super().__init__(config, stage, dtype)
        layers = {layer: DecoderLayer(config, layer) for layer in stage.layers(config.num_hidden_layers)}
        decoder = Decoder(config, stage, layers, RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
        self.model = Qwen3VLModel(config, stage, decoder)
        if stage.is_last:
            # a tied head is the embedding itself, one module under two names: it cannot come apart
            is_tied = config.tie_word_embeddings
            self.lm_head = decoder.embed_tokens if is_tied else Linear(config.hidden_size, config.vocab_size)

    @property
    def decoder(self) -> Decoder:
        """The text model."""
        return self.model.language_model

    @property
    def visual(self) -> VisionTower:
        """The vision tower, of a stage that holds it."""
        return self.model.visual

    def embed(self, input_ids_BT: torch.Tensor, seen: Seen | None = None) -> torch.Tensor:
        """Hidden states the first decoder layer takes, [B, T, D] in the compute dtype."""
        return self.decoder.embed(input_ids_BT, self.dtype, seen)

    def head(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [B, T, V]."""
        return self.lm_head.project(x_BTD)

    @staticmethod
    def cache_entries(config: Qwen3VLConfig, stage: Stage, rows: int, capacity: int) -> dict[str, dict[str, Entry]]:
        """What the layers of a stage keep, by layer number."""
        return Qwen3ForCausalLM.cache_entries(config, stage, rows, capacity)


Qwen3VLMoeForConditionalGeneration = Qwen3VLForConditionalGeneration
