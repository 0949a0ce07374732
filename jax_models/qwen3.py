"""Qwen3, dense and mixture of experts. Module paths spell the checkpoint's tensor names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jax_models.layers.attention import Attention, key_value_entries
from jax_models.layers.decoder import Decoder
from jax_models.layers.linear import Linear
from jax_models.layers.mlp import MLP
from jax_models.layers.moe import SparseMoeBlock
from jax_models.layers.norm import RMSNorm
from jax_models.layers.step import Entry, LayerCache, Step
from jax_models.taps import tap
from loaders.qwen3 import Qwen3Config, Qwen3MoeConfig
from loaders.stage import Stage


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    path: str = ""

    def __init__(self, config: Qwen3Config, layer: int, mesh: Mesh | None) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(
            config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            bias=config.attention_bias,
            mesh=mesh,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if isinstance(config, Qwen3MoeConfig) and config.is_sparse(layer):
            self.mlp = SparseMoeBlock(
                config.hidden_size,
                num_experts=config.num_experts,
                expert_size=config.moe_intermediate_size,
                top_k=config.num_experts_per_tok,
                norm_topk_prob=config.norm_topk_prob,
                mesh=mesh,
            )
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def __call__(
        self, x_BTD: jax.Array, step: Step, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        normed_BTD = tap(self.path, "input_layernorm", self.input_layernorm(x_BTD), "modules")
        attended_BTD, cache = self.self_attn(normed_BTD, step, cache)
        x_BTD = tap(self.path, "residual", x_BTD + tap(self.path, "self_attn", attended_BTD, "modules"), "modules")
        normed_BTD = tap(self.path, "post_attention_layernorm", self.post_attention_layernorm(x_BTD), "modules")
        return x_BTD + tap(self.path, "mlp", self.mlp(normed_BTD), "modules"), cache


class Qwen3ForCausalLM(nnx.Module):
    """The model and its head. Serves Qwen3MoeForCausalLM too: a layer asks ``config.is_sparse``."""

    def __init__(self, config: Qwen3Config, stage: Stage, mesh: Mesh | None, dtype: jnp.dtype) -> None:
        layers = {layer: DecoderLayer(config, layer, mesh) for layer in stage.layers(config.num_hidden_layers)}
        self.model = Decoder(config, stage, layers, RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
        if stage.is_last and not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.is_tied = config.tie_word_embeddings
        self.dtype = dtype

    @property
    def decoder(self) -> Decoder:
        """The text model."""
        return self.model

    def embed(self, input_ids_BT: jax.Array) -> jax.Array:
        """Hidden states the first decoder layer takes, [B, T, D] in the compute dtype."""
        return self.model.embed(input_ids_BT, self.dtype)

    def head(self, x_BTD: jax.Array) -> jax.Array:
        """Logits, float32 [B, T, V]."""
        table = self.model.embed_tokens if self.is_tied else self.lm_head
        return table.project(x_BTD)

    @staticmethod
    def cache_entries(config: Qwen3Config, stage: Stage, rows: int, capacity: int) -> dict[str, dict[str, Entry]]:
        """What the layers of a stage keep, by layer number."""
        entries = key_value_entries(rows, capacity, config.num_key_value_heads, config.head_dim)
        return {str(layer): entries for layer in stage.layers(config.num_hidden_layers)}


Qwen3MoeForCausalLM = Qwen3ForCausalLM
