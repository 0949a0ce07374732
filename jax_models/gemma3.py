"""Gemma 3, text. Module paths spell the checkpoint's tensor names. Source: transformers ``modeling_gemma3``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jax_models.layers.attention import Attention, key_value_entries
from jax_models.layers.decoder import Decoder
from jax_models.layers.linear import Linear
from jax_models.layers.mlp import MLP, gelu_tanh
from jax_models.layers.norm import GemmaRMSNorm
from jax_models.layers.step import Entry, LayerCache, Step
from jax_models.taps import tap
from loaders.gemma3 import Gemma3Config
from loaders.stage import Stage


class DecoderLayer(nnx.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))): what a branch adds is normed too."""

    path: str = ""

    def __init__(self, config: Gemma3Config, mesh: Mesh | None) -> None:
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = GemmaRMSNorm(size, eps=eps)
        self.self_attn = Attention(
            size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            eps=eps,
            bias=config.attention_bias,
            mesh=mesh,
            norm=GemmaRMSNorm,
            scale=config.query_pre_attn_scalar**-0.5,
            softcap=config.attn_logit_softcapping,
        )
        self.post_attention_layernorm = GemmaRMSNorm(size, eps=eps)
        self.pre_feedforward_layernorm = GemmaRMSNorm(size, eps=eps)
        self.mlp = MLP(size, config.intermediate_size, activation=gelu_tanh)
        self.post_feedforward_layernorm = GemmaRMSNorm(size, eps=eps)

    def __call__(
        self, x_BTD: jax.Array, step: Step, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        normed_BTD = tap(self.path, "input_layernorm", self.input_layernorm(x_BTD), "modules")
        mixed_BTD, cache = self.self_attn(normed_BTD, step, cache)
        mixed_BTD = self.post_attention_layernorm(tap(self.path, "self_attn", mixed_BTD, "modules"))
        mixed_BTD = tap(self.path, "post_attention_layernorm", mixed_BTD, "modules")
        normed_BTD, x_BTD = self.pre_feedforward_layernorm.add_norm(mixed_BTD, x_BTD)
        x_BTD = tap(self.path, "residual", x_BTD, "modules")
        normed_BTD = tap(self.path, "pre_feedforward_layernorm", normed_BTD, "modules")
        mixed_BTD = self.post_feedforward_layernorm(tap(self.path, "mlp", self.mlp(normed_BTD), "modules"))
        return x_BTD + tap(self.path, "post_feedforward_layernorm", mixed_BTD, "modules"), cache


class Gemma3ForCausalLM(nnx.Module):
    """The model and its head."""

    def __init__(self, config: Gemma3Config, stage: Stage, mesh: Mesh | None, dtype: jnp.dtype) -> None:
        layers = {layer: DecoderLayer(config, mesh) for layer in stage.layers(config.num_hidden_layers)}
        self.model = Decoder(config, stage, layers, GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps))
        if stage.is_last and not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.config = config
        self.dtype = dtype

    @property
    def decoder(self) -> Decoder:
        """The text model."""
        return self.model

    def embed(self, input_ids_BT: jax.Array) -> jax.Array:
        """Hidden states the first decoder layer takes, [B, T, D] in the compute dtype.

        Rows are multiplied by √D as the compute dtype has it: in bfloat16 that is another number.
        """
        scale = jnp.asarray(self.config.hidden_size**0.5, self.dtype)
        x_BTD = self.model.embed_tokens(input_ids_BT, self.dtype) * scale
        return tap("model", "embed_tokens", x_BTD, "layers")

    def head(self, x_BTD: jax.Array) -> jax.Array:
        """Logits, float32 [B, T, V]."""
        table = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        logits_BTV = table.project(x_BTD)
        if (cap := self.config.final_logit_softcapping) is not None:
            logits_BTV = jnp.tanh(logits_BTV / cap) * cap
        return logits_BTV

    @staticmethod
    def cache_entries(config: Gemma3Config, stage: Stage, rows: int, capacity: int) -> dict[str, dict[str, Entry]]:
        """What the layers of a stage keep, by layer number."""
        entries = key_value_entries(rows, capacity, config.num_key_value_heads, config.head_dim)
        return {str(layer): entries for layer in stage.layers(config.num_hidden_layers)}
