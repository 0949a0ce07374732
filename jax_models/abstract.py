"""Weights and caches as shapes and shardings: enough to lower and compile a model that fits no machine at hand.

``programs_for(...).decode.lower(abstract_weights(...), ids, cache=abstract_cache(...)).compile()`` compiles
for a device mesh that need not exist (``jax.experimental.topologies``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh

from jax_models.cache import Cache, empty_cache
from jax_models.programs import Weights, model_class
from jax_models.sharding import param_sharding, row_sharding
from jax_models.weights import unflatten
from loaders.dtypes import to_numpy
from loaders.reading.plan import specs_of
from loaders.spec import ModelConfig
from loaders.stage import Stage


def abstract_weights(
    config: ModelConfig,
    mesh: Mesh | None,
    dtype: Any,
    stage: Stage | None = None,
    stored: Mapping[str, str] = MappingProxyType({}),
) -> Weights:
    """What ``load`` would place: codes and scales in their own dtypes, plain weights in ``dtype``.

    ``stored``: safetensors dtype of the plain weights that have another, by parameter.
    """
    dims, flat = config.dims(), {}
    for spec in specs_of(config, stage or Stage()):
        named = spec.dtype or stored.get(spec.name)
        sharding = param_sharding(spec, dims, mesh)
        flat[spec.name] = jax.ShapeDtypeStruct(spec.shape, to_numpy(named) if named else dtype, sharding=sharding)
    return unflatten(flat)


def abstract_cache(
    config: ModelConfig, rows: int, capacity: int, dtype: Any, mesh: Mesh | None, stage: Stage | None = None
) -> Cache:
    """What ``Programs.empty_cache`` would make."""
    sizes = {"rows": rows, "capacity": capacity}
    entries = model_class(config).cache_entries(config, stage or Stage(), **sizes)
    return empty_cache(entries, **sizes, dtype=dtype, mesh=mesh, make=jax.ShapeDtypeStruct)


def abstract_rows(shape: tuple[int, ...], dtype: Any, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    """Token ids, a mask or positions [B, ...], cut as the programs cut them."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=row_sharding(mesh, shape[0]))
