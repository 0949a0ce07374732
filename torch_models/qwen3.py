"""Qwen3, dense and mixture of experts. Module paths spell the checkpoint's tensor names."""

from __future__ import annotations

import torch
from torch import nn

from loaders.qwen3 import Qwen3Config, Qwen3MoeConfig
from loaders.stage import Stage
from torch_models.cache import Cache, cache_like
from torch_models.layers.attention import Attention, LayerCache, visible
from torch_models.layers.linear import Embedding, Linear, project
from torch_models.layers.mlp import MLP
from torch_models.layers.moe import SparseMoeBlock
from torch_models.layers.norm import RMSNorm
from torch_models.layers.rotary import rotary_embedding
from torch_models.model import Model
from torch_models.taps import tap


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Qwen3Config, layer: int) -> None:
        super().__init__()
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
            )
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x_BTD: torch.Tensor,
        cos_BTR: torch.Tensor,
        sin_BTR: torch.Tensor,
        visible_BTS: torch.Tensor,
        cache: LayerCache | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_BTR, sin_BTR, visible_BTS, cache, start)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Qwen3Model(nn.Module):
    """Embedding, this stage's decoder layers, final norm."""

    def __init__(self, config: Qwen3Config, stage: Stage) -> None:
        super().__init__()
        if stage.is_first or (stage.is_last and config.tie_word_embeddings):
            self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict(
            {str(layer): DecoderLayer(config, layer) for layer in stage.layers(config.num_hidden_layers)}
        )
        if stage.is_last:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.config = config
        self.stage = stage

    def forward(
        self,
        x_BTD: torch.Tensor,
        position_ids_BT: torch.Tensor,
        key_mask_BS: torch.Tensor,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        config = self.config
        start = 0 if cache is None else cache.length
        # a frequency that depends on the length: over the batch, as transformers; with a cache, each row as if alone
        length_B = position_ids_BT.amax(1) + 1
        if cache is None:
            length_B = length_B.amax().expand_as(length_B)
        cos_BTR, sin_BTR = rotary_embedding(
            config.rope_parameters, config.head_dim, config.max_position_embeddings, position_ids_BT, length_B
        )
        layer_indices = self.stage.layers(config.num_hidden_layers)
        windows = {config.window(layer) for layer in layer_indices}
        visible_BTS = {window: visible(key_mask_BS, start, x_BTD.shape[1], window) for window in windows}
        for layer in layer_indices:
            name = str(layer)
            x_BTD = self.layers[name](
                x_BTD,
                cos_BTR,
                sin_BTR,
                visible_BTS[config.window(layer)],
                None if cache is None else cache.layers[name],
                start,
            )
            tap(f"model.layers.{layer}", x_BTD)
        if cache is not None:
            cache.advance(x_BTD.shape[1])
        if self.stage.is_last:
            x_BTD = tap("model.norm", self.norm(x_BTD))
        return x_BTD


class Qwen3ForCausalLM(Model):
    """The model and its head. Serves Qwen3MoeForCausalLM too: a layer asks ``config.is_sparse``."""

    config: Qwen3Config
    model: Qwen3Model

    def __init__(self, config: Qwen3Config, stage: Stage, dtype: torch.dtype) -> None:
        super().__init__(config, stage, dtype)
        self.model = Qwen3Model(config, stage)
        if stage.is_last:
            # a tied head is the embedding itself, one module under two names: it cannot come apart
            is_tied = config.tie_word_embeddings
            self.lm_head = self.model.embed_tokens if is_tied else Linear(config.hidden_size, config.vocab_size)

    def embed(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states the first decoder layer takes, [B, T, D] in the compute dtype."""
        return tap("model.embed_tokens", self.model.embed_tokens(input_ids_BT, self.dtype))

    def head(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [B, T, V]."""
        return project(x_BTD, self.lm_head.weight)

    def empty_cache(self, rows: int, capacity: int) -> Cache:
        """A cache with no token in it."""
        config, stamp = self.config, self.weights_stamp()
        layers, heads = self.stage.layers(config.num_hidden_layers), config.num_key_value_heads
        dtype, device = self.dtype, self.device
        return cache_like(layers, rows, capacity, heads, config.head_dim, dtype, device, self.version, stamp)


Qwen3MoeForCausalLM = Qwen3ForCausalLM
