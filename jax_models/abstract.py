"""Weights and caches as shapes and shardings: enough to lower and compile a model that fits no machine at hand.

``programs_for(...).decode.lower(abstract_weights(...), ids, cache=abstract_cache(...)).compile()`` compiles
for a device mesh that need not exist (``jax.experimental.topologies``).
"""

from __future__ import annotations

from typing import Any

import jax
from flax import traverse_util
from jax.sharding import Mesh

from jax_models.cache import Cache, cache_like
from jax_models.programs import Weights
from jax_models.sharding import param_sharding, row_sharding
from loaders.plan import specs_of
from loaders.qwen3 import Qwen3Config
from loaders.stage import Stage


def abstract_weights(config: Qwen3Config, mesh: Mesh | None, dtype: Any, stage: Stage | None = None) -> Weights:
    """What ``load`` would place, all in one stored ``dtype``."""
    dims = config.dims()
    flat = {
        spec.name: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=param_sharding(spec, dims, mesh))
        for spec in specs_of(config, stage or Stage())
    }
    return traverse_util.unflatten_dict(flat, sep=".")


def abstract_cache(
    config: Qwen3Config, rows: int, capacity: int, dtype: Any, mesh: Mesh | None, stage: Stage | None = None
) -> Cache:
    """What ``empty_cache`` would make."""
    layers = (stage or Stage()).layers(config.num_hidden_layers)
    heads, head_dim = config.num_key_value_heads, config.head_dim
    return cache_like(jax.ShapeDtypeStruct, layers, rows, capacity, heads, head_dim, dtype, mesh)


def abstract_rows(shape: tuple[int, ...], dtype: Any, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    """Token ids, a mask or positions [B, ...], cut as the programs cut them."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=row_sharding(mesh, shape[0]))
