"""Quantisation documents for tests: what exporters write, and what is made of it."""

from loaders.config import config_from_json
from loaders.quantization.documents import read_recipes
from loaders.quantization.schemes import Scheme
from parity.zoo import block_sizes, zoo_config

FOUR = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
W4A4, W4A16 = Scheme("nvfp4", True), Scheme("nvfp4", False)
FP8 = Scheme("fp8", True)
CT = {**FOUR, "strategy": "tensor_group", "symmetric": True}
SMALL = {"num_hidden_layers": 2}
HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


def inside(algorithm="NVFP4", **changes):
    group = {"input_activations": FOUR, "weights": FOUR, "targets": ["Linear"]}
    groups = {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    return groups | {"quant_algo": algorithm, "quant_method": "modelopt"} | changes


def beside(algorithm="NVFP4", **changes):
    said = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}
    return {"producer": {"name": "modelopt"}, "quantization": said | changes}


def compressed(group=None, **changes):
    own = {"weights": CT, "input_activations": CT | {"dynamic": "local"}, "targets": ["Linear"]} | (group or {})
    document = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["lm_head"]}
    return document | {"config_groups": {"group_0": own}} | changes


def mixed(layers, **changes):
    return inside("MIXED_PRECISION", quantized_layers=layers, ignore=[], **changes)


def resolved(document, beside=None, *, name="qwen3", found=(), **sizes):
    """The table of schemes that documents mean for a zoo model of the tensors ``found``, and problems."""
    sizes = block_sizes(name) | (HYBRID if "qwen3_5" in name else SMALL) | sizes
    config_document = zoo_config(name, **sizes) | ({} if document is None else {"quantization_config": document})
    config, problems = config_from_json(config_document, beside=beside, found=found)
    return ({} if config is None or config.quantization is None else config.quantization.table), problems


def excluded(names, **options):
    """Modules of a zoo model that a list of names leaves alone."""
    found, problems = resolved(inside(ignore=names), **options)
    assert problems == []
    return sorted(resolved(inside(ignore=[]), **options)[0].keys() - found.keys())


def problems_of(document, beside=None):
    recipes, problems = read_recipes(document, beside)
    assert (not recipes) == (bool(problems) or (document is None and beside is None))
    return problems


ATTENTION = [f"model.layers.0.self_attn.{name}" for name in ("k_proj", "o_proj", "q_proj", "v_proj")]
QKV = [f"model.layers.0.self_attn.{name}_proj" for name in "kqv"]
GATE_UP = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
