"""The body of a decoder-only model: embedding, this stage's decoder layers, final norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loaders.stage import Stage
from torch_models.cache import Cache
from torch_models.layers.linear import Embedding
from torch_models.layers.step import steps
from torch_models.layers.vision import Seen
from torch_models.taps import tap


class Decoder(nn.Module):
    """Runs the layers it is given; a family differs in what they and the norm are.

    Args:
        config: of the family; what ``layers.step.steps`` asks of it, sizes, and whether the head is tied.
        stage: which layers these are, and whether the embedding and the norm are here.
        layers: by number.
        norm: the final norm.
    """

    def __init__(self, config: Any, stage: Stage, layers: Mapping[int, nn.Module], norm: nn.Module) -> None:
        super().__init__()
        if stage.holds_embedding(is_tied=config.tie_word_embeddings):
            self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict({str(layer): module for layer, module in layers.items()})
        if stage.is_last:
            self.norm = norm
        self.config = config
        self.stage = stage
        self.path = config.text_paths[0]

    def embed(self, ids_BT: torch.Tensor, dtype: torch.dtype, seen: Seen | None = None) -> torch.Tensor:
        """Embeddings, [B, T, D], with what the vision tower saw in its places."""
        x_BTD = self.embed_tokens(ids_BT, dtype)
        return tap(self.path, "embed_tokens", x_BTD if seen is None else seen.placed(x_BTD), "layers")

    def forward(
        self,
        x_BTD: torch.Tensor,
        position_ids: torch.Tensor,
        key_mask_BS: torch.Tensor,
        cache: Cache | None = None,
        *,
        keep_history: bool = False,
        seen: Seen | None = None,
    ) -> torch.Tensor:
        """Hidden states after the stage, [B, T, D]; the cache is written in place.

        Args:
            x_BTD: embeddings, or hidden states of the stage before.
            position_ids: integers [B, T] or [3, B, T].
            key_mask_BS: bool, real tokens; with a cache of all its slots, these tokens included.
            cache: what came before; None: nothing did.
            keep_history: leave in the cache what undoing some of these tokens takes.
            seen: what the vision tower made of images among these tokens.
        """
        indices = self.stage.layers(self.config.num_hidden_layers)
        step_of = steps(
            self.config,
            indices,
            position_ids,
            key_mask_BS,
            0 if cache is None else cache.slot,
            length=x_BTD.shape[1],
            is_cached=cache is not None,
            keep_history=keep_history,
        )
        for layer in indices:
            name = str(layer)
            x_BTD = self.layers[name](x_BTD, step_of[layer], None if cache is None else cache.layers[name])
            if seen is not None:
                x_BTD = seen.deepened(x_BTD, layer)
            x_BTD = tap(self.path, f"layers.{layer}", x_BTD, "layers")
        if cache is not None:
            cache.advance(step_of[indices[0]].mask_BT)
        if self.stage.is_last:
            x_BTD = tap(self.path, "norm", self.norm(x_BTD), "layers")
        return x_BTD
