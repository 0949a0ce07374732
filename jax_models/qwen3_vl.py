"""Qwen3-VL, dense and mixture of experts: Qwen3 with a vision tower. Module paths spell the tensors' names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jax_models.layers.decoder import Decoder
from jax_models.layers.linear import Linear
from jax_models.layers.norm import RMSNorm
from jax_models.layers.step import Entry
from jax_models.layers.vision import Seen, VisionTower
from jax_models.qwen3 import DecoderLayer, Qwen3ForCausalLM
from loaders.qwen3_vl import Qwen3VLConfig
from loaders.stage import Stage


class Qwen3VLModel(nnx.Module):
    """The vision tower, where it is, and the text model."""

    def __init__(self, config: Qwen3VLConfig, stage: Stage, language_model: Decoder) -> None:
        if config.vision is not None and stage.has_tower:
            self.visual = VisionTower(config.vision)
        self.language_model = language_model


class Qwen3VLForConditionalGeneration(nnx.Module):
    """The model and its head. Serves Qwen3VLMoeForConditionalGeneration too: a layer asks ``config.is_sparse``."""

    def __init__(self, config: Qwen3VLConfig, stage: Stage, mesh: Mesh | None, dtype: jnp.dtype) -> None:
        layers = {layer: DecoderLayer(config, layer, mesh) for layer in stage.layers(config.num_hidden_layers)}
        decoder = Decoder(config, stage, layers, RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
        self.model = Qwen3VLModel(config, stage, decoder)
        if stage.is_last and not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.is_tied = config.tie_word_embeddings
        self.dtype = dtype

    @property
    def decoder(self) -> Decoder:
        """The text model."""
        return self.model.language_model

    @property
    def visual(self) -> VisionTower:
        """The vision tower, of a stage that holds it."""
        return self.model.visual

    def embed(self, input_ids_BT: jax.Array, seen: Seen | None = None) -> jax.Array:
        """Hidden states the first decoder layer takes, [B, T, D] in the compute dtype."""
        return self.decoder.embed(input_ids_BT, self.dtype, seen)

    def head(self, x_BTD: jax.Array) -> jax.Array:
        """Logits, float32 [B, T, V]."""
        table = self.decoder.embed_tokens if self.is_tied else self.lm_head
        return table.project(x_BTD)

    @staticmethod
    def cache_entries(config: Qwen3VLConfig, stage: Stage, rows: int, capacity: int) -> dict[str, dict[str, Entry]]:
        """What the layers of a stage keep, by layer number."""
        return Qwen3ForCausalLM.cache_entries(config, stage, rows, capacity)


Qwen3VLMoeForConditionalGeneration = Qwen3VLForConditionalGeneration
