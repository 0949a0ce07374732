"""Puts quantised layers in the place of plain ones, by module path: families know nothing of quantisation."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jax_models.layers.linear import Linear
from jax_models.layers.moe import Experts
from jax_models.layers.products import Cuts
from jax_models.layers.quantized import FP8Linear, NVFP4Linear
from jax_models.layers.quantized_experts import NVFP4Experts
from loaders.axes import gathered, param_cuts
from loaders.quantization.schemes import KV_LEAVES, KVCache, Scheme, kv_leaf
from loaders.spec import Dim, Specs


def install(
    model: nnx.Module, specs: Specs, dims: dict[str, Dim], mesh: Mesh | None, *, quantizes_inputs: bool
) -> None:
    """Replace every module that has a scheme.

    Args:
        model: as its family built it, abstract or not.
        specs: of the parameters that are here, with their schemes.
        dims: of the configuration.
        mesh: devices the weights are cut over.
        quantizes_inputs: as the checkpoint says; False: weights only.
    Raises:
        ValueError: a scheme that is not implemented for the module it is of.
    """
    params = {spec.name: spec for spec in specs}
    for path, scheme in specs.schemes.items():
        owner, _, leaf = path.rpartition(".")
        parent, cuts = module_at(model, owner), Cuts(mesh)
        codes = params.get(f"{path}.{scheme.leaves['codes']}")
        if mesh is not None and codes is not None:
            cuts = Cuts(mesh, *gathered(param_cuts(codes, dims, mesh.shape)))
        setattr(parent, leaf, _quantized(path, getattr(parent, leaf), scheme, cuts, quantizes_inputs))


def _quantized(path: str, plain: nnx.Module, scheme: Scheme, cuts: Cuts, quantizes_inputs: bool) -> nnx.Module:
    match plain, scheme.weights:
        case Experts(), "nvfp4":
            return NVFP4Experts(plain, scheme, quantizes_inputs=quantizes_inputs)
        case Linear(), "nvfp4":
            return NVFP4Linear(plain, scheme, cuts, quantizes_inputs=quantizes_inputs)
        case Linear(), "fp8":
            return FP8Linear(plain, scheme, quantizes_inputs=quantizes_inputs)
    raise ValueError(f"{path} is {scheme}, which is not implemented for {type(plain).__name__}")


def module_at(module: Any, path: str) -> Any:
    """The module at a checkpoint path."""
    for name in filter(None, path.split(".")):
        module = module[name] if isinstance(module, nnx.Dict) else getattr(module, name)
    return module


def install_cache(model: nnx.Module, specs: Specs, kv_cache: KVCache | None, *, honoured: bool) -> None:
    """Give key and value projections the scales of an FP8 cache, and attention the order to use it.

    Args:
        model: as its family built it, abstract or not.
        specs: of the parameters that are here.
        kv_cache: what the checkpoint says.
        honoured: whether to do what it says; scales are loaded in any case.
    """
    for spec in specs:
        path, _, leaf = spec.name.rpartition(".")
        if leaf in KV_LEAVES:
            setattr(module_at(model, path), leaf, nnx.Param(jnp.zeros(())))
        if honoured and kv_leaf(path) is not None and specs.rules[spec.placements[0].tensor].on == "layer":
            module_at(model, path.rpartition(".")[0]).kv_cache = kv_cache
