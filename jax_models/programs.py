"""The compiled functions of a model: made once per (config, stage, dtype, mesh), pure in the weights.

Weights are always an argument, never a constant of the program, so an update changes what is computed and compiles
nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jax_models.adapter_room import RowAdapters, wrap
from jax_models.batch import Batch
from jax_models.cache import Cache, empty_cache, placed, zeros
from jax_models.compiling import decode_options, platform_of
from jax_models.draft import DraftPrograms
from jax_models.layers.install import install, install_cache
from jax_models.layers.lora import active_rows
from jax_models.layers.vision import Seen, Shown
from jax_models.sharding import row_sharding
from jax_models.stepwise import StepwisePrograms
from jax_models.taps import Level, collect, name_modules
from loaders.families import FAMILIES
from loaders.quantization.schemes import WEIGHTS_ONLY, Activations
from loaders.reading.plan import specs_of
from loaders.spec import ModelConfig
from loaders.stage import Stage

Weights = dict[str, Any]  # nested; flattened paths are checkpoint names


def programs_for(
    config: ModelConfig,
    stage: Stage,
    dtype: jnp.dtype,
    mesh: Mesh | None,
    activations: Activations = WEIGHTS_ONLY,
) -> Programs:
    """Shared by every model of the same shape and platform, so that loading another checkpoint compiles nothing."""
    return shared_programs(config, stage, dtype, mesh, activations, platform_of(mesh))


@functools.lru_cache(maxsize=64)
def shared_programs(
    config: ModelConfig, stage: Stage, dtype: jnp.dtype, mesh: Mesh | None, activations: Activations, platform: str
) -> Programs:
    """Those of ``programs_for``; options of one platform's compiler are refused by another's."""
    del platform  # what sets them apart; ``Programs`` asks for itself
    return Programs(config, stage, dtype, mesh, activations)


def model_class(config: ModelConfig) -> Any:
    """The family's class of this architecture: ``decoder``, ``embed``, ``head`` and ``cache_entries``."""
    return vars(importlib.import_module(f"jax_models.{FAMILIES[config.architecture]}"))[config.architecture]


class Programs:
    """Forward, prefill and decode of one pipeline stage.

    ``activations``: what is rounded beside the weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        stage: Stage,
        dtype: jnp.dtype,
        mesh: Mesh | None,
        activations: Activations = WEIGHTS_ONLY,
    ) -> None:
        family = model_class(config)

        def build() -> Any:
            module = family(config, stage, mesh, dtype)
            specs = specs_of(config, stage)
            install(module, specs, config.dims(), mesh, quantizes_inputs=activations.inputs)
            kv_cache = None if config.quantization is None else config.quantization.kv_cache
            install_cache(module, specs, kv_cache, honoured=activations.cache)
            name_modules(module)
            return module

        self.graphdef, state = nnx.split(nnx.eval_shape(build))
        self.abstract: Weights = nnx.to_pure_dict(state)
        self.config = config
        self.stage = stage
        self.dtype = dtype
        self.mesh = mesh
        self.activations = activations
        self.cache_entries = functools.partial(family.cache_entries, config, stage)
        self.forward = jax.jit(self.apply)
        self.forward_with_taps = jax.jit(self._apply_with_taps, static_argnames=("level", "within"))
        self.see = jax.jit(self._see)
        self.prefill = jax.jit(self._prefill, donate_argnames="cache")
        self.appending = {"donate_argnames": "cache", "compiler_options": decode_options(mesh)}
        self.decode = jax.jit(self.decode_step, **self.appending)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """float32 means float32: a TPU would otherwise multiply in bfloat16 passes. Others mean what they are."""
        return jax.default_matmul_precision("highest" if self.dtype == jnp.float32 else "default")

    @functools.cached_property
    def draft(self) -> DraftPrograms:
        """The functions of speculative decoding; of a stage that has a draft."""
        return DraftPrograms(self)

    @functools.cached_property
    def stepwise(self) -> StepwisePrograms:
        """Prefill and decode that also return taps."""
        return StepwisePrograms(self)

    def empty_cache(self, *, rows: int, capacity: int, make: Callable[..., Any] = zeros) -> Cache:
        """A cache with no token in it, of what ``make(shape, dtype, sharding=...)`` returns."""
        sizes = {"rows": rows, "capacity": capacity}
        return empty_cache(self.cache_entries(**sizes), **sizes, dtype=self.dtype, mesh=self.mesh, make=make)

    @contextlib.contextmanager
    def module(self, weights: Weights, adapters: RowAdapters | None) -> Iterator[Any]:
        """Inside a program: the family's module with these weights, and with the adapters of the rows, if any."""
        with self.precision(), active_rows(None if adapters is None else jnp.asarray(adapters.slot)):
            module = nnx.merge(self.graphdef, weights)
            if adapters is not None:
                wrap(module, adapters, self.config)
            yield module

    def apply(
        self,
        weights: Weights,
        batch: Batch,
        adapters: RowAdapters | None = None,
    ) -> jax.Array:
        """The whole stage, pure."""
        with self.module(weights, adapters) as module:
            x_BTD, seen = self.enter_seeing(module, batch)
            x_BTD, _ = module.decoder(x_BTD, batch.position_ids, batch.mask_BT, seen=seen)
            return module.head(x_BTD) if self.stage.is_last else x_BTD

    def _apply_with_taps(
        self,
        weights: Weights,
        batch: Batch,
        adapters: RowAdapters | None = None,
        level: Level = "layers",
        within: str | None = None,
        inject: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        with collect(level, within, inject) as taps:
            out = self.apply(weights, batch, adapters)
        return out, taps

    def _see(self, weights: Weights, shown: Shown) -> tuple[jax.Array, ...]:
        """What the vision tower makes of patches; see ``VisionTower``."""
        with self.precision():
            return nnx.merge(self.graphdef, weights).visual(shown, self.dtype)

    def _prefill(
        self,
        weights: Weights,
        batch: Batch,
        cache: Cache,
        adapters: RowAdapters | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Fill an empty cache with T tokens; logits [B, V] of the last, or a stage's hidden states [B, T, D]."""
        with self.module(weights, adapters) as module:
            x_BTD, _, cache = self.read_into(module, batch, cache)
            return (self.last_logits(module, x_BTD) if self.stage.is_last else x_BTD), cache

    def last_logits(self, module: Any, x_BTD: jax.Array) -> jax.Array:
        """Inside a program: logits [B, V] of each row's next token alone; a prompt's others would fill the memory."""
        return module.head(x_BTD[:, -1:])[:, 0]

    def read_into(self, module: Any, batch: Batch, cache: Cache) -> tuple[jax.Array, Seen | None, Cache]:
        """Inside a program: final hidden states of a prompt, [B, T, D], what it shows, and the cache that holds it.

        The cache must be empty.
        """
        key_mask_BS = jax.lax.dynamic_update_slice_in_dim(cache.key_mask, batch.mask_BT, 0, axis=1)
        x_BTD, seen = self.enter_seeing(module, batch)
        x_BTD, cache = module.decoder(x_BTD, batch.position_ids, key_mask_BS, cache, is_first=True, seen=seen)
        if batch.vision is not None:  # an image takes fewer positions than tokens
            cache = dataclasses.replace(cache, position=cache.position + batch.vision.delta_B)
        return x_BTD, seen, self.placed(cache)

    def decode_step(
        self, weights: Weights, entry: jax.Array, cache: Cache, adapters: RowAdapters | None = None
    ) -> tuple[jax.Array, Cache]:
        """Append one token a row. ``entry``: ids [B, 1] or hidden states [B, 1, D]."""
        key_mask_BS = cache.key_mask | (jnp.arange(cache.key_mask.shape[1]) == cache.length)
        with self.module(weights, adapters) as module:
            x_B1D = self.enter(module, entry)
            x_B1D, cache = module.decoder(x_B1D, cache.position[:, None], key_mask_BS, cache)
            return (self.last_logits(module, x_B1D) if self.stage.is_last else x_B1D), self.placed(cache)

    def placed(self, cache: Cache) -> Cache:
        """Inside a program: the cache where ``empty_cache`` puts it."""
        rows, capacity = cache.key_mask.shape
        return placed(cache, self.cache_entries(rows=rows, capacity=capacity), self.mesh)

    def enter_seeing(self, module: Any, batch: Batch) -> tuple[jax.Array, Seen | None]:
        """Hidden states of the stage's first layer, and what the vision tower saw; None: nothing is shown."""
        if batch.vision is None:
            return self.enter(module, batch.entry), None
        tokens_UD, *levels = module.visual(batch.vision.shown, self.dtype)
        seen = Seen(tokens_UD, tuple(levels), batch.vision.slot_BT)
        return self.enter(module, batch.entry, seen), seen

    def enter(self, module: Any, entry: jax.Array, *seen: Seen) -> jax.Array:
        """Hidden states of the stage's first layer, rows cut over the mesh."""
        x_BTD = module.embed(entry, *seen) if self.stage.is_first else entry.astype(self.dtype)
        if self.mesh is None:
            return x_BTD
        # callers give host arrays, placed nowhere: the rows are cut here
        return jax.lax.with_sharding_constraint(x_BTD, row_sharding(self.mesh, x_BTD.shape[0]))
