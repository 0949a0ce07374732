"""The least a program can move and compute on one device: every weight once, what is cached once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax

from jax_models.abstract import abstract_cache
from jax_models.programs import model_class
from loaders.axes import FSDP, axes_of, head_cuts, param_cuts
from loaders.spec import ModelConfig, ParamSpec, Specs
from loaders.stage import Stage
from parity.planning.meshes import Workload, abstract_mesh, row_axes, rows_on_device, specs_for, weight_size


@dataclass(frozen=True)
class Minimum:
    """Per device, of one run.

    Attributes:
        weight_bytes: every weight that is used, once; of the embedding only a tied head reads more than rows.
        expert_bytes: those of them that are experts'.
        distinct_expert_bytes: of the experts that so many tokens are expected to choose.
        cache_bytes: decode reads the keys and values that its windows show, once, and reads and writes states; prefill
            writes its tokens'.
        flops: products and sums of weights, keys and values; those of recurrent states, a few of a hundred, left out.
    """

    weight_bytes: int
    expert_bytes: int
    distinct_expert_bytes: int
    cache_bytes: int
    flops: int

    @property
    def bytes(self) -> int:
        """With all experts."""
        return self.weight_bytes + self.cache_bytes

    @property
    def distinct_bytes(self) -> int:
        """With the experts that are expected to be chosen."""
        return self.bytes - self.expert_bytes + self.distinct_expert_bytes


def minimum_of(
    config: ModelConfig, program: str, load: Workload, sizes: dict[str, int], stage: Stage | None = None
) -> Minimum:
    """Of ``prefill`` or ``decode``.

    A part that ``fsdp`` cuts is read once, and multiplied with the rows of all that have the others: or these are
    gathered, and all of it is multiplied with a part of the rows, which is as much.
    """
    stage = stage or Stage()
    mesh: Any = abstract_mesh(sizes)
    specs, dims = specs_for(config, stage), config.dims()
    rows = rows_on_device(load.rows, sizes)
    gathered = sizes[FSDP] if FSDP in row_axes(load.rows, sizes) else 1
    tokens = rows * (load.prompt if program == "prefill" else 1)
    share = _chosen_share(config)
    weights = experts = flops = 0
    distinct = 0.0
    for spec in specs:
        if _is_unused(spec, specs):
            continue
        held, size = weight_size(spec, dims, mesh, load)
        is_expert = spec.axes[:1] == ("E",) and len(spec.axes) > 2
        shared = gathered if any(FSDP in axes_of(cut) for cut in param_cuts(spec, dims, sizes)) else 1
        weights += size
        if is_expert:
            experts += size
            distinct += size * (1 - (1 - share) ** (tokens * shared))
        rule = specs.rules[spec.placements[0].tensor]
        if is_expert or rule.is_linear or rule.is_router or spec.name == specs.head:
            inner = spec.axes[-1] if spec.axes else ""  # codes are two to a byte, block scales beside them
            numbers = held * (2 if inner.endswith("/2") else 0 if inner.endswith("/16") else 1)
            times = rows if spec.name == specs.head else tokens * share if is_expert else tokens
            flops += int(2 * numbers * times * shared)
    cached, attended = _cached(config, program, load, mesh, stage)
    return Minimum(weights, experts, int(distinct), cached, flops + attended)


def _chosen_share(config: Any) -> float:
    """Of a layer's experts, what one token is sent to; without experts all there is."""
    count = config.dims()["E"].size if "E" in config.dims() else 0
    return config.num_experts_per_tok / count if count else 1.0


def _is_unused(spec: ParamSpec, specs: Specs) -> bool:
    """Weights that no text program reads whole: a table of embeddings, a vision tower."""
    is_table = spec.name == specs.embedding and specs.head != specs.embedding
    return is_table or specs.rules[spec.placements[0].tensor].is_visual


def _cached(config: Any, program: str, load: Workload, mesh: Any, stage: Stage) -> tuple[int, int]:
    """Bytes of the cache that are moved, and the flops of attending to it."""
    entries = model_class(config).cache_entries(config, stage, rows=load.rows, capacity=load.context)
    cache = abstract_cache(config, load.rows, load.context, jax.numpy.dtype(load.dtype), mesh, stage)
    moved = flops = 0
    for layer, parts in cache.layers.items():
        for name, leaf in parts.items():
            shape = leaf.sharding.shard_shape(leaf.shape)
            size = math.prod(shape) * leaf.dtype.itemsize
            if "S" not in entries[layer][name].axes:
                moved += size * (1 if program == "prefill" else 2)
                continue
            kept = min(config.window(int(layer)) or load.context, load.context)
            seen = kept if program == "decode" else seen_by_prompt(load.prompt, min(kept, load.prompt))
            tokens = 1 if program == "decode" else load.prompt
            queries, asked = heads_on_device(
                dict(mesh.shape), config.num_attention_heads, entries[layer][name].shape[1]
            )
            read = size * asked // shape[1]
            moved += (size * load.prompt if program == "prefill" else read * kept) // load.context
            flops += int(2 * shape[0] * tokens * seen * queries * shape[3])
    return moved, flops


def heads_on_device(sizes: dict[str, int], num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """Query heads of one device, and how many heads of keys and values those ask for, at most.

    Where a mesh cuts the former further, a device keeps more of the latter than it asks for.
    """
    by_query, _ = head_cuts(sizes, num_heads, num_kv_heads)
    parts = math.prod(sizes[by] for by in axes_of(by_query))
    queries, group = num_heads // parts, num_heads // num_kv_heads
    starts = range(0, num_heads, queries)
    return queries, max(1 + (start + queries - 1) // group - start // group for start in starts)


def seen_by_prompt(tokens: int, window: int) -> float:
    """Keys a token attends to on average: as many as stand before it, with itself, and no more than the window."""
    return window - window * (window - 1) / (2 * tokens)
