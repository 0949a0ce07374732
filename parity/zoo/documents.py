"""Quantisation documents of the zoo, key for key what nvidia-modelopt 0.47 and compressed-tensors 0.20 write.

Not made by the code of ``loaders`` that writes such documents, nor by any that reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loaders.quantization.schemes import BLOCK, Scheme, Spelling

PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def exporter_documents(
    schemes: Mapping[str, Scheme], excluded: list[str], *, spelling: Spelling, activations: bool, kv_cache: bool
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """``quantization_config`` of config.json, and hf_quant_config.json where the exporter writes one.

    Args:
        schemes: module -> scheme of all that is quantised.
        excluded: names or patterns of what is not.
        spelling: which exporter.
        activations: inputs of NVFP4 layers are quantised.
        kv_cache: there are FP8 scales of keys and values.
    """
    if spelling == "compressed-tensors":
        return _compressed_tensors(excluded, activations=activations), None
    if len(set(schemes.values())) > 1:
        algorithm, inside, said = _mixed(schemes)
    else:
        scheme = next(iter(schemes.values()), Scheme("nvfp4", activations))
        algorithm, said = _algorithm(scheme), {"group_size": BLOCK, "exclude_modules": excluded}
        inside = {"config_groups": {"group_0": _group(scheme) | {"targets": ["Linear"]}}, "ignore": excluded}
    inside["quant_algo"] = algorithm
    if kv_cache:
        inside["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    inside |= {"producer": PRODUCER, "quant_method": "modelopt"}
    quantization = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8" if kv_cache else None} | said
    return inside, {"producer": PRODUCER, "quantization": quantization}


def _mixed(schemes: Mapping[str, Scheme]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Algorithm, what config.json and what hf_quant_config.json says of layers: a table, and nothing of the others."""
    sizes = {"nvfp4": {"group_size": BLOCK}, "fp8": {}}
    layers = {
        module: {"quant_algo": _algorithm(scheme)} | sizes[scheme.weights] for module, scheme in sorted(schemes.items())
    }
    groups = {
        f"group_{number}": _group(scheme) | {"targets": [module for module in layers if schemes[module] == scheme]}
        for number, scheme in enumerate(dict.fromkeys(schemes[module] for module in layers))
    }
    inside = {"config_groups": groups, "quantized_layers": layers, "ignore": []}
    return "MIXED_PRECISION", inside, {"quantized_layers": layers}


def _algorithm(scheme: Scheme) -> str:
    if scheme.weights == "fp8":
        return "FP8"
    return "NVFP4" if scheme.activations else "W4A16_NVFP4"


def _group(scheme: Scheme) -> dict[str, Any]:
    bits: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
    if scheme.weights == "nvfp4":
        bits |= {"num_bits": 4, "group_size": BLOCK}
    return ({"input_activations": bits} if scheme.activations else {}) | {"weights": bits}


def _compressed_tensors(ignored: list[str], *, activations: bool) -> dict[str, Any]:
    bits = {"group_size": BLOCK, "num_bits": 4, "scale_dtype": "torch.float8_e4m3fn", "strategy": "tensor_group"}
    bits |= {"symmetric": True, "type": "float"}
    group = {
        "format": "nvfp4-pack-quantized",
        "input_activations": bits | {"dynamic": "local", "observer": "static_minmax"} if activations else None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": bits | {"dynamic": False, "observer": "memoryless_minmax"},
    }
    return {
        "config_groups": {"group_0": group},
        "format": "nvfp4-pack-quantized",
        "global_compression_ratio": None,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
    }
