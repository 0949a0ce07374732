"""Qwen3.5, dense and mixture of experts, and its draft. Module paths spell the checkpoint's tensor names."""

from __future__ import annotations

import torch
from torch import nn

from loaders.qwen3_5 import Qwen3_5Config, Qwen3_5MoeConfig
from loaders.stage import Stage
from torch_models.layers.attention import key_value_entries
from torch_models.layers.decoder import Decoder
from torch_models.layers.gated_attention import GatedAttention
from torch_models.layers.gated_delta import GatedDeltaNet, delta_entries
from torch_models.layers.linear import Linear
from torch_models.layers.mlp import MLP
from torch_models.layers.norm import GemmaRMSNorm
from torch_models.layers.shared_expert import SharedExpertMoeBlock
from torch_models.layers.step import Entry, LayerCache, Step
from torch_models.layers.vision import Seen, VisionTower
from torch_models.model import Model
from torch_models.taps import tap


class DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the mixer is attention or a gated delta net."""

    path: str = ""

    def __init__(self, config: Qwen3_5Config, *, is_linear: bool) -> None:
        super().__init__()
        self.input_layernorm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if is_linear:
            self.linear_attn = GatedDeltaNet(
                config.hidden_size,
                num_key_heads=config.linear_num_key_heads,
                num_value_heads=config.linear_num_value_heads,
                key_head_dim=config.linear_key_head_dim,
                value_head_dim=config.linear_value_head_dim,
                taps=config.linear_conv_kernel_dim,
                eps=config.rms_norm_eps,
            )
        else:
            self.self_attn = GatedAttention(
                config.hidden_size,
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                eps=config.rms_norm_eps,
                bias=config.attention_bias,
            )
        self.post_attention_layernorm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if isinstance(config, Qwen3_5MoeConfig):
            self.mlp = SharedExpertMoeBlock(
                config.hidden_size,
                num_experts=config.num_experts,
                expert_size=config.moe_intermediate_size,
                shared_size=config.shared_expert_intermediate_size,
                top_k=config.num_experts_per_tok,
                norm_topk_prob=config.norm_topk_prob,
            )
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.is_linear = is_linear

    def forward(self, x_BTD: torch.Tensor, step: Step, cache: LayerCache | None = None) -> torch.Tensor:
        mixer = self.linear_attn if self.is_linear else self.self_attn
        normed_BTD = tap(self.path, "input_layernorm", self.input_layernorm(x_BTD), "modules")
        mixed_BTD = mixer(normed_BTD, step, cache)
        mixed_BTD = tap(self.path, "linear_attn" if self.is_linear else "self_attn", mixed_BTD, "modules")
        normed_BTD, x_BTD = self.post_attention_layernorm.add_norm(mixed_BTD, x_BTD)
        x_BTD = tap(self.path, "residual", x_BTD, "modules")
        normed_BTD = tap(self.path, "post_attention_layernorm", normed_BTD, "modules")
        return x_BTD + tap(self.path, "mlp", self.mlp(normed_BTD), "modules")


class Qwen3_5MTP(nn.Module):
    """The draft: a guess at the token after the next, from a hidden state and the next token.

    It has no embedding and no head; it is given embeddings, and its output goes through the head of whom it drafts for.
    Source: the published checkpoints' ``mtp.*``; transformers ``MtpLayer``.
    """

    def __init__(self, config: Qwen3_5Config) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.fc = Linear(2 * size, size)
        self.pre_fc_norm_embedding = GemmaRMSNorm(size, eps=eps)
        self.pre_fc_norm_hidden = GemmaRMSNorm(size, eps=eps)
        self.layers = nn.ModuleDict(
            {str(layer): DecoderLayer(config, is_linear=False) for layer in range(config.num_mtp_layers)}
        )
        self.norm = GemmaRMSNorm(size, eps=eps)

    def forward(
        self, embedded_BTD: torch.Tensor, hidden_BTD: torch.Tensor, step: Step, cache: LayerCache | None = None
    ) -> torch.Tensor:
        """Normed hidden states, [B, T, D].

        Args:
            embedded_BTD: embeddings of the tokens after those that ``hidden_BTD`` is of.
            hidden_BTD: final hidden states of the model, or what this returned.
            step: positions are those of the embedded tokens.
            cache: of its one layer.
        """
        parts = (self.pre_fc_norm_embedding(embedded_BTD), self.pre_fc_norm_hidden(hidden_BTD))
        x_BTD = self.fc(torch.cat(parts, dim=-1))
        for layer in range(len(self.layers)):
            x_BTD = self.layers[str(layer)](x_BTD, step, cache)
        return self.norm(x_BTD)


class Qwen3_5Model(nn.Module):
    """The multimodal wrapper: the vision tower, where it is, and the text model."""

    def __init__(self, config: Qwen3_5Config, stage: Stage, language_model: Decoder) -> None:
        super().__init__()
        if config.vision is not None and stage.has_tower:
            self.visual = VisionTower(config.vision)
        self.language_model = language_model


class Qwen3_5ForCausalLM(Model):
    """The model, its head and, if asked for, its draft. Serves all four architectures: the config says what differs."""

    config: Qwen3_5Config

    def __init__(self, config: Qwen3_5Config, stage: Stage, dtype: torch.dtype) -> None:
        super().__init__(config, stage, dtype)
        layers = {
            layer: DecoderLayer(config, is_linear=config.has_linear_attention(layer))
            for layer in stage.layers(config.num_hidden_layers)
        }
        decoder = Decoder(config, stage, layers, GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps))
        self.model = Qwen3_5Model(config, stage, decoder) if config.is_wrapped else decoder
        if stage.is_last:
            # a tied head is the embedding itself, one module under two names: it cannot come apart
            is_tied = config.tie_word_embeddings
            self.lm_head = decoder.embed_tokens if is_tied else Linear(config.hidden_size, config.vocab_size)
        if stage.has_draft:
            self.mtp = Qwen3_5MTP(config)

    @property
    def decoder(self) -> Decoder:
        """The text model."""
        return self.model.language_model if isinstance(self.model, Qwen3_5Model) else self.model

    @property
    def visual(self) -> VisionTower:
        """The vision tower, of a wrapper that holds it."""
        assert isinstance(self.model, Qwen3_5Model), "the text model alone sees nothing"
        return self.model.visual

    def embed(self, input_ids_BT: torch.Tensor, seen: Seen | None = None) -> torch.Tensor:
        """Hidden states the first decoder layer takes, [B, T, D] in the compute dtype."""
        return self.decoder.embed(input_ids_BT, self.dtype, seen)

    def head(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [B, T, V]."""
        return self.lm_head.project(x_BTD)

    @staticmethod
    def cache_entries(config: Qwen3_5Config, stage: Stage, rows: int, capacity: int) -> dict[str, dict[str, Entry]]:
        """What the layers of a stage keep, by layer number; the draft's under ``mtp``."""
        attention = key_value_entries(rows, capacity, config.num_key_value_heads, config.head_dim)
        linear = delta_entries(
            rows,
            channels=2 * config.key_dim + config.value_dim,
            taps=config.linear_conv_kernel_dim,
            state=(config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim),
        )
        layers = stage.layers(config.num_hidden_layers)
        entries = {str(layer): linear if config.has_linear_attention(layer) else attention for layer in layers}
        return entries | ({"mtp": attention} if stage.has_draft else {})


Qwen3_5MoeForCausalLM = Qwen3_5ForCausalLM
Qwen3_5ForConditionalGeneration = Qwen3_5ForCausalLM
Qwen3_5MoeForConditionalGeneration = Qwen3_5ForCausalLM
