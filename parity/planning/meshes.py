"""How a model is cut over a slice, and what each device then holds: arithmetic alone, nothing is compiled."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import AbstractMesh

from jax_models.abstract import abstract_cache
from jax_models.sharding import param_sharding
from loaders.axes import FSDP, LOGICAL_AXES, axes_of, cut_of
from loaders.dtypes import bits, to_numpy
from loaders.reading.plan import specs_of
from loaders.spec import Dim, ModelConfig, ParamSpec, Specs
from loaders.stage import Stage

PROGRAMS = ("prefill", "decode")
AXES = ("data", FSDP, "expert", "tensor")  # outermost first
LANES = 128  # of a vector register: narrower parts of an expert leave the multiplier idle, and are copied to be padded


@dataclass(frozen=True)
class Workload:
    """What is asked of a model.

    Attributes:
        rows: sequences at a time.
        context: slots of the cache, for each row.
        prompt: tokens of each row that prefill reads.
        dtype: what is computed in, and keys and values are kept in.
        plain: safetensors dtype of weights that are neither codes nor scales.
        stored: and of those of them that have another, by parameter.
    """

    rows: int
    context: int
    prompt: int
    dtype: str
    plain: str = "BF16"
    stored: Mapping[str, str] = field(default_factory=dict, hash=False)


def parse_mesh(text: str) -> dict[str, int]:
    """``expert=2,tensor=4`` as sizes of axes.

    Raises:
        ValueError: listing every part that is not understood.
    """
    sizes: dict[str, int] = {}
    problems = []
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes or not (size.isascii() and size.isdigit()) or int(size) < 1:
            problems.append(repr(part))
        else:
            sizes[axis] = int(size)
    if problems:
        expected = f"axis=size of {', '.join(AXES)}, each at most once"
        raise ValueError(f"--mesh {text}: {', '.join(problems)} not understood, expected {expected}")
    return sizes


def held_bytes(tree: Any) -> int:
    """Bytes of abstract arrays on one device."""
    shapes = ((leaf, leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * leaf.dtype.itemsize for leaf, shape in shapes)


def mesh_shape(sizes: dict[str, int]) -> dict[str, int]:
    """Every axis that a mesh of these sizes has, also of one device; ``fsdp`` where it is asked for alone."""
    return {axis: sizes.get(axis, 1) for axis in AXES if axis != FSDP or sizes.get(axis, 1) > 1}


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """A mesh without devices."""
    shape = mesh_shape(sizes)
    return AbstractMesh(tuple(shape.values()), tuple(shape))


def row_axes(rows: int, sizes: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes that so many rows are cut by: of ``data`` and ``fsdp`` those that divide them."""
    return axes_of(cut_of(sizes, LOGICAL_AXES["B"], rows))


def rows_on_device(rows: int, sizes: dict[str, int]) -> int:
    """Of so many rows: all of them where no axis cuts them."""
    return rows // math.prod(sizes[axis] for axis in row_axes(rows, sizes))


@functools.lru_cache(maxsize=8)
def specs_for(config: ModelConfig, stage: Stage) -> Specs:
    """``specs_of``, kept: hundreds of experts in a hundred layers take seconds to list."""
    return specs_of(config, stage)


def weight_size(spec: ParamSpec, dims: dict[str, Dim], mesh: Any, load: Workload) -> tuple[int, int]:
    """Elements and bytes of one parameter on one device."""
    sharding = param_sharding(spec, dims, mesh)
    assert sharding is not None
    elements = math.prod(sharding.shard_shape(spec.shape))
    return elements, elements * to_numpy(spec.dtype or load.stored.get(spec.name, load.plain)).itemsize


def stored_bytes(config: ModelConfig, load: Workload, stage: Stage | None = None) -> dict[str, int]:
    """Bytes of all devices' weights by safetensors dtype, most first."""
    sizes: Counter[str] = Counter()
    for spec in specs_for(config, stage or Stage()):
        name = spec.dtype or load.stored.get(spec.name, load.plain)
        sizes[name] += math.prod(spec.shape) * bits(name) // 8
    return dict(sizes.most_common())


def held(config: ModelConfig, load: Workload, sizes: dict[str, int], stage: Stage | None = None) -> tuple[int, int]:
    """Bytes of weights and of the cache on one device."""
    mesh: Any = abstract_mesh(sizes)
    stage, dims = stage or Stage(), config.dims()
    weights = sum(weight_size(spec, dims, mesh, load)[1] for spec in specs_for(config, stage))
    cache = abstract_cache(config, load.rows, load.context, jax.numpy.dtype(load.dtype), mesh, stage)
    return weights, held_bytes(cache)


def default_mesh(config: ModelConfig, devices: int, load: Workload, room: int) -> dict[str, int]:
    """A cut that leaves little on each device, of weights and cache, which is also what a decode step reads.

    Experts are spread before they are cut, and not into parts whose rows fill no whole registers unless nothing else
    leaves each device the ``room`` that it has, in bytes; rows are spread where heads no longer can be: keys and values
    that no axis cuts lie on every device. Rather than that, models without experts have an ``expert`` axis too: both
    axes cut heads of queries, and one those of keys and values, of which there are fewer. Where no such cut leaves
    room, weights may be cut by ``fsdp``. All devices are used: libtpu compiles for part of a slice or does not, six of
    eight v5e for one.
    """
    return dict(_default_mesh(config, devices, load, room))


@functools.lru_cache(maxsize=64)
def _default_mesh(config: ModelConfig, devices: int, load: Workload, room: int) -> Mapping[str, int]:
    """See ``default_mesh``; kept, for a plan asks of every slice again and again."""
    dims = config.dims()
    # of the rows of experts, as they are stored: two codes lie in a byte
    parts = {axis.partition("/")[2] or "1" for *_, axis in _stacks(config) if axis in ("M", "M/2")}
    widths = [dims["M"].size // int(part) for part in parts]
    experts = dims["E"].size if "E" in dims else 1

    def cost(sizes: dict[str, int]) -> tuple[Any, ...]:
        tensor, size = sizes.get("tensor", 1), sum(held(config, load, sizes))
        is_narrow = tensor > 1 and any(width // tensor % LANES for width in widths)
        return size > room, is_narrow, size, len(sizes), tensor if experts > 1 else -tensor

    usual = min(_cuts(devices, load.rows, experts), key=cost)
    keys = dims["KH"].units or dims["KH"].size
    if experts == 1 and usual.get("tensor", 1) > 1 and cut_of(usual, LOGICAL_AXES["KH"], keys) is None:
        usual = min([usual, *_cuts(devices, load.rows, devices)], key=cost)
    if not cost(usual)[0] or sum(held(config, load, {})) > room * devices:  # there is room, or cannot be
        return usual
    return min([usual, *_cuts(devices, devices, experts, rows_by=FSDP)], key=cost)


def _stacks(config: ModelConfig) -> Iterator[tuple[str, ...]]:
    """The axes of every parameter that has one matrix of each expert."""
    return (spec.axes for spec in specs_for(config, Stage()) if spec.axes[:1] == ("E",))


def _cuts(devices: int, rows: int, experts: int, rows_by: str = "data") -> Iterator[dict[str, int]]:
    """Every mesh of so many devices whose axes divide what they are to spread."""
    for data in (size for size in range(1, devices + 1) if devices % size == 0 and rows % size == 0):
        rest = devices // data
        for expert in (size for size in range(1, rest + 1) if rest % size == 0 and experts % size == 0):
            sizes = {rows_by: data, "expert": expert, "tensor": rest // expert}
            yield {axis: size for axis, size in sizes.items() if size > 1}
