"""Puts quantised layers in the place of plain ones, by module path: families know nothing of quantisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loaders.quantization.schemes import KV_LEAVES, KVCache, Scheme, kv_leaf
from loaders.spec import Specs
from torch_models.kernels.choice import Kernel, choose, of_experts
from torch_models.layers.linear import Linear, empty_param
from torch_models.layers.moe import Experts
from torch_models.layers.quantized import FP8Linear, NVFP4Linear
from torch_models.layers.quantized_experts import NVFP4Experts


def install(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    device: torch.device,
    *,
    quantizes_inputs: bool,
    kernel: str | None = None,
) -> dict[str, str]:
    """Replace every module that has a scheme. Nothing has storage yet.

    Args:
        model: as its family built it.
        schemes: module path -> scheme, of the modules that are here.
        device: where the weights will live: it decides on the kernel.
        quantizes_inputs: as the checkpoint says; False: weights only.
        kernel: see ``torch_models.kernels.choice``.
    Returns:
        Module path -> name of the kernel that runs it.
    Raises:
        ValueError: a kernel that the device cannot run.
    """
    found: dict[str, str] = {}
    for path, scheme in schemes.items():
        owner, _, leaf = path.rpartition(".")
        activations = scheme.activations and quantizes_inputs
        chosen = choose(kernel, device, activations=activations) if scheme.weights == "nvfp4" else None
        plain = model.get_submodule(path)
        if chosen is not None and isinstance(plain, Experts):
            chosen = of_experts(chosen)
        setattr(model.get_submodule(owner), leaf, _quantized(path, plain, scheme, chosen, quantizes_inputs))
        found[path] = "fp8" if chosen is None else chosen.name
    return found


def _quantized(path: str, plain: nn.Module, scheme: Scheme, kernel: Kernel | None, quantizes_inputs: bool) -> nn.Module:
    match plain, kernel:
        case Experts(), Kernel():
            return NVFP4Experts(plain, scheme, kernel, quantizes_inputs=quantizes_inputs)
        case Linear(), Kernel():
            return NVFP4Linear(plain, scheme, kernel, quantizes_inputs=quantizes_inputs)
        case Linear(), None:
            return FP8Linear(plain, scheme, quantizes_inputs=quantizes_inputs)
    raise ValueError(f"{path} is {scheme}, which is not implemented for {type(plain).__name__}")


def install_cache(model: nn.Module, specs: Specs, kv_cache: KVCache | None, *, honoured: bool) -> None:
    """Give key and value projections the scales of an FP8 cache, and attention the order to use it.

    Args:
        model: as its family built it.
        specs: of the parameters that are here.
        kv_cache: what the checkpoint says.
        honoured: whether to do what it says; scales are loaded in any case.
    """
    for spec in specs:
        path, _, leaf = spec.name.rpartition(".")
        if leaf in KV_LEAVES:
            setattr(model.get_submodule(path), leaf, empty_param())
        if honoured and kv_leaf(path) is not None and specs.rules[spec.placements[0].tensor].on == "layer":
            attention: Any = model.get_submodule(path.rpartition(".")[0])
            attention.kv_cache = kv_cache
