"""The body of a decoder-only model: embedding, this stage's decoder layers, final norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_models.cache import Cache
from jax_models.layers.linear import Embedding
from jax_models.layers.step import LayerCache, steps
from jax_models.layers.vision import Seen
from jax_models.taps import tap
from loaders.stage import Stage


class Decoder(nnx.Module):
    """Runs the layers it is given; a family differs in what they and the norm are.

    Args:
        config: of the family; what ``layers.step.steps`` asks of it, sizes, and whether the head is tied.
        stage: which layers these are, and whether the embedding and the norm are here.
        layers: by number.
        norm: the final norm.
    """

    def __init__(self, config: Any, stage: Stage, layers: Mapping[int, nnx.Module], norm: nnx.Module) -> None:
        if stage.holds_embedding(is_tied=config.tie_word_embeddings):
            self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nnx.Dict({str(layer): module for layer, module in layers.items()})
        if stage.is_last:
            self.norm = norm
        self.config = config
        self.stage = stage
        self.path = config.text_paths[0]

    def embed(self, ids_BT: jax.Array, dtype: jnp.dtype, seen: Seen | None = None) -> jax.Array:
        """Embeddings, [B, T, D], with what the vision tower saw in its places."""
        x_BTD = self.embed_tokens(ids_BT, dtype)
        return tap(self.path, "embed_tokens", x_BTD if seen is None else seen.placed(x_BTD), "layers")

    def __call__(
        self,
        x_BTD: jax.Array,
        position_ids: jax.Array,
        key_mask_BS: jax.Array,
        cache: Cache | None = None,
        *,
        keep_history: bool = False,
        is_first: bool = False,
        seen: Seen | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states after the stage, [B, T, D], and the cache that replaces the one given.

        Args:
            x_BTD: embeddings, or hidden states of the stage before.
            position_ids: int32 [B, T] or [3, B, T].
            key_mask_BS: bool, real tokens; with a cache of all its slots, these tokens included.
            cache: what came before; None: nothing did.
            keep_history: leave in the cache what undoing some of these tokens takes.
            is_first: the cache is empty.
            seen: what the vision tower made of images among these tokens.
        """
        indices = self.stage.layers(self.config.num_hidden_layers)  # by number: the names sort as text
        step_of = steps(
            self.config,
            indices,
            position_ids,
            key_mask_BS,
            0 if cache is None else cache.length,
            length=x_BTD.shape[1],
            is_cached=cache is not None,
            keep_history=keep_history,
            is_first=is_first,
        )
        layer_caches: dict[str, LayerCache] = {} if cache is None else dict(cache.layers)
        for layer in indices:
            name = str(layer)
            x_BTD, kept = self.layers[name](x_BTD, step_of[layer], layer_caches.get(name))
            if kept is not None:
                layer_caches[name] = kept
            if seen is not None:
                x_BTD = seen.deepened(x_BTD, layer)
            x_BTD = tap(self.path, f"layers.{layer}", x_BTD, "layers")
        if cache is not None:
            cache = cache.advanced(layer_caches, key_mask_BS, step_of[indices[0]].mask_BT)
        if self.stage.is_last:
            x_BTD = tap(self.path, "norm", self.norm(x_BTD), "layers")
        return x_BTD, cache
