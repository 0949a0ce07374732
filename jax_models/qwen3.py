"""Qwen3, dense and mixture of experts. Module paths spell the checkpoint's tensor names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jax_models.cache import Cache, cache_like, zeros
from jax_models.layers.attention import Attention, LayerCache, visible
from jax_models.layers.linear import Embedding, Linear, project
from jax_models.layers.mlp import MLP
from jax_models.layers.moe import SparseMoeBlock
from jax_models.layers.norm import RMSNorm
from jax_models.layers.rotary import rotary_embedding
from jax_models.taps import tap
from loaders.qwen3 import Qwen3Config, Qwen3MoeConfig
from loaders.stage import Stage


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Qwen3Config, layer: int, mesh: Mesh | None) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(
            config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            eps=config.rms_norm_eps,
            bias=config.attention_bias,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if isinstance(config, Qwen3MoeConfig) and config.is_sparse(layer):
            self.mlp = SparseMoeBlock(
                config.hidden_size,
                num_experts=config.num_experts,
                expert_size=config.moe_intermediate_size,
                top_k=config.num_experts_per_tok,
                norm_topk_prob=config.norm_topk_prob,
                layer=layer,
                mesh=mesh,
            )
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def __call__(
        self,
        x_BTD: jax.Array,
        cos_BTR: jax.Array,
        sin_BTR: jax.Array,
        visible_BTS: jax.Array,
        cache: LayerCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, LayerCache | None]:
        attended_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), cos_BTR, sin_BTR, visible_BTS, cache, start)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), cache


class Qwen3Model(nnx.Module):
    """Embedding, this stage's decoder layers, final norm."""

    def __init__(self, config: Qwen3Config, stage: Stage, mesh: Mesh | None) -> None:
        if stage.is_first or (stage.is_last and config.tie_word_embeddings):
            self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nnx.Dict(
            {str(layer): DecoderLayer(config, layer, mesh) for layer in stage.layers(config.num_hidden_layers)}
        )
        if stage.is_last:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.config = config
        self.stage = stage

    def __call__(
        self, x_BTD: jax.Array, position_ids_BT: jax.Array, key_mask_BS: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        config = self.config
        start = 0 if cache is None else cache.length
        # a frequency that depends on the length: over the batch, as transformers; with a cache, each row as if alone
        length_B = jnp.max(position_ids_BT, axis=1) + 1
        if cache is None:
            length_B = jnp.broadcast_to(jnp.max(length_B), length_B.shape)
        cos_BTR, sin_BTR = rotary_embedding(
            config.rope_parameters, config.head_dim, config.max_position_embeddings, position_ids_BT, length_B
        )
        layer_indices = self.stage.layers(config.num_hidden_layers)
        windows = {config.window(layer) for layer in layer_indices}
        visible_BTS = {window: visible(key_mask_BS, start, x_BTD.shape[1], window) for window in windows}
        layer_caches: dict[str, LayerCache] = {}
        for layer in layer_indices:  # by number: the names sort as text
            name = str(layer)
            x_BTD, layer_cache = self.layers[name](
                x_BTD,
                cos_BTR,
                sin_BTR,
                visible_BTS[config.window(layer)],
                None if cache is None else cache.layers[name],
                start,
            )
            if layer_cache is not None:
                layer_caches[name] = layer_cache
            tap(f"model.layers.{layer}", x_BTD)
        if cache is not None:
            cache = cache.advanced(layer_caches, key_mask_BS, x_BTD.shape[1])
        if self.stage.is_last:
            x_BTD = tap("model.norm", self.norm(x_BTD))
        return x_BTD, cache


class Qwen3ForCausalLM(nnx.Module):
    """The model and its head. Serves Qwen3MoeForCausalLM too: a layer asks ``config.is_sparse``."""

    def __init__(self, config: Qwen3Config, stage: Stage, mesh: Mesh | None, dtype: jnp.dtype) -> None:
        self.model = Qwen3Model(config, stage, mesh)
        if stage.is_last and not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.is_tied = config.tie_word_embeddings
        self.dtype = dtype

    def embed(self, input_ids_BT: jax.Array) -> jax.Array:
        """Hidden states the first decoder layer takes, [B, T, D] in the compute dtype."""
        return tap("model.embed_tokens", self.model.embed_tokens(input_ids_BT, self.dtype))

    def head(self, x_BTD: jax.Array) -> jax.Array:
        """Logits, float32 [B, T, V]."""
        table = self.model.embed_tokens if self.is_tied else self.lm_head
        return project(x_BTD, table.weight[...])

    @staticmethod
    def empty_cache(
        config: Qwen3Config,
        stage: Stage,
        dtype: Any,
        mesh: Mesh | None,
        *,
        rows: int,
        capacity: int,
        make: Callable[..., Any] = zeros,
    ) -> Cache:
        """A cache with no token in it, of what ``make(shape, dtype, sharding=...)`` returns."""
        layers, heads = stage.layers(config.num_hidden_layers), config.num_key_value_heads
        return cache_like(make, layers, rows, capacity, heads, config.head_dim, dtype, mesh)


Qwen3MoeForCausalLM = Qwen3ForCausalLM
