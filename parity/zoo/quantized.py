"""Quantised models of the zoo: the same weights in NVFP4 or FP8, with documents and tensors as exporters write them.

Real exporters make the scales of matrices that engines fuse alike, and calibrate inputs; both hide bugs. Here scales
can be different for every matrix, and inputs have scales drawn from the seed. Documents are written from what the
exporters wrote, not by the code that reads them. Source: nvidia-modelopt 0.47, compressed-tensors 0.20.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import ml_dtypes
import numpy as np

from loaders.expand import expand
from loaders.families import family_module
from loaders.nvfp4 import global_divisor, global_scale, quantize
from loaders.quantization.documents import DOCUMENT
from loaders.quantization.schemes import BLOCK, Scheme, Spelling, kv_leaf
from loaders.spec import ModelConfig, Rule, Specs
from loaders.stage import Stage
from loaders.writing.writer import TensorType
from parity.zoo.documents import exporter_documents
from parity.zoo.models import ZOO

E4M3_MAX = 448.0
# what engines multiply as one, and exporters give one global scale; in this order where they are to differ
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("in_proj_qkv", "in_proj_z"))
APART = (1.0, 1.7, 2.9)  # no power of two: folding one into block scales would round
INPUT_AMAX = {"down_proj": (6.0, 12.0), "o_proj": (2.5, 4.0), "out_proj": (2.5, 4.0)}  # others have a norm before them
NORMED_AMAX, CACHE_AMAX = (4.0, 6.0), (3.0, 8.0)
ODD = {
    "hidden_size": 80,
    "intermediate_size": 112,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 176,
    "linear_num_value_heads": 6,
    "linear_value_head_dim": 8,
}
ALIGNED = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 512,
    "linear_num_value_heads": 8,
    "linear_value_head_dim": 16,
    "linear_key_head_dim": 64,
}


@dataclass(frozen=True, kw_only=True)
class ZooQuantization:
    """How a zoo model is quantised.

    Attributes:
        spelling: whose documents and tensor names.
        activations: inputs have scales too (W4A4); False: weights only (W4A16).
        kv_cache: keys and values have FP8 scales; ModelOpt's alone.
        unify: q/k/v and gate/up share their scales, as from exporters; False: every matrix has its own.
        exclude: globs of modules to leave alone, beside embedding, head, routers, gates and the draft.
        fp8: globs of modules that are FP8 instead; the documents are then of a mixed recipe. ModelOpt's alone.
        head: quantise the head too, as some mixed recipes do.
        scope: ModelOpt's documents: in config.json and beside it ("wide"), or one of the two.
    """

    spelling: Spelling = "modelopt"
    activations: bool = True
    kv_cache: bool = False
    unify: bool = True
    exclude: tuple[str, ...] = ()
    fp8: tuple[str, ...] = ()
    head: bool = False
    scope: Literal["wide", "config.json", "hf_quant_config.json"] = "wide"

    def __post_init__(self) -> None:
        if self.spelling == "compressed-tensors" and (self.kv_cache or self.fp8 or self.scope != "wide"):
            raise ValueError("kv_cache, fp8 and scope go with spelling='modelopt'")


def block_sizes(name: str, *, aligned: bool = False) -> dict[str, Any]:
    """Config overrides that give a zoo model layers whose inputs are multiples of 16, and otherwise odd.

    No matrix is square, no number of block scales a multiple of 4, no number of rows one of 128; or, ``aligned``, all
    are: then the 128x4 order of block scales is as large as the plain one, and takes its storage.
    """
    config = ZOO[name].config
    sizes = ALIGNED if aligned else ODD
    if ZOO[name].model_type == "gemma3_text" and not aligned:
        sizes = sizes | {"hidden_size": 144, "num_attention_heads": 6}  # transformers wants a multiple of the heads
    return {key: size for key, size in sizes.items() if key in config}


def quantize_zoo(
    name: str,
    config: ModelConfig,
    plan: Mapping[str, TensorType],
    read: Callable[[str], np.ndarray],
    how: ZooQuantization,
    *,
    seed: int,
) -> tuple[dict[str, TensorType], Callable[[str], np.ndarray], dict[str, Any] | None, dict[str, Any] | None]:
    """A zoo model quantised.

    Args:
        name: key of ``ZOO``; with ``seed`` and a module's name it decides on scales.
        config: its configuration.
        plan: its plain tensors, experts one by one.
        read: their values.
        how: what to make of them.
        seed: see ``name``.
    Returns:
        Its tensors, their values, ``quantization_config`` of config.json and hf_quant_config.json; None for a document
        that is not to be.
    """
    rules = expand(family_module(config.architecture).RULES, config, Stage(mtp=config.num_mtp_layers > 0), plan)
    schemes = _schemes(rules, plan, how)
    amax = {module: _amax(read(f"{module}.weight")) for module in schemes}
    amax = {module: _global_amax(module, amax, how, _rng(name, seed, f"{module} global")) for module in amax}

    def values(module: str) -> dict[str, np.ndarray]:
        leader = _together(module)[0] if how.unify else module
        low, high = INPUT_AMAX.get(module.rpartition(".")[2], NORMED_AMAX)
        input_amax = _rng(name, seed, f"{leader} input").uniform(low, high)
        return _parts(read(f"{module}.weight"), schemes[module], amax[module], input_amax)

    made = {module: values(module) for module in schemes}
    for tensor, rule in rules.rules.items():
        leaf = kv_leaf(tensor)
        if how.kv_cache and leaf is not None and rule.on == "layer":
            module = tensor.removesuffix(".weight")
            most = _rng(name, seed, f"{module} cache").uniform(*CACHE_AMAX)
            made.setdefault(module, {})[leaf] = np.asarray(most / E4M3_MAX, np.float32)
    arrays = {f"{module}.{leaf}": array for module, parts in made.items() for leaf, array in parts.items()}
    types: dict[str, TensorType] = {}
    for tensor, kind in plan.items():  # a module's tensors stand where its weight stood
        module, _, leaf = tensor.rpartition(".")
        types |= {} if leaf == "weight" and module in schemes else {tensor: kind}
        own = made.get(module, {}) if leaf == "weight" else {}
        types |= {f"{module}.{other}": TensorType.of(array) for other, array in own.items()}
    inside, beside = exporter_documents(
        schemes,
        _left_alone(rules, plan, schemes, how),
        spelling=how.spelling,
        activations=how.activations,
        kv_cache=how.kv_cache,
    )
    inside, beside = (
        one if how.scope in ("wide", where) else None for one, where in ((inside, "config.json"), (beside, DOCUMENT))
    )

    def read_quantized(tensor: str) -> np.ndarray:
        return arrays[tensor] if tensor in arrays else read(tensor)

    return types, read_quantized, inside, beside


def _schemes(rules: Specs, plan: Mapping[str, TensorType], how: ZooQuantization) -> dict[str, Scheme]:
    """Module -> scheme of every matrix that is to be quantised."""
    found: dict[str, Scheme] = {}
    for tensor, rule in rules.rules.items():
        module = tensor.removesuffix(".weight")
        if tensor not in plan or not _is_candidate(rule, how) or _matches(module, how.exclude):
            continue
        if _matches(module, how.fp8):
            found[module] = Scheme("fp8", activations=True)
        elif plan[tensor].shape[-1] % BLOCK == 0:
            found[module] = Scheme("nvfp4", how.activations, how.spelling)
    return found


def _is_candidate(rule: Rule, how: ZooQuantization) -> bool:
    return rule.is_linear and not rule.is_gate and (rule.on == "layer" or (how.head and rule.on == "head"))


def _matches(module: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(module, glob) for glob in globs)


def _together(module: str) -> list[str]:
    """The modules that engines fuse with this one, itself among them."""
    parent, _, leaf = module.rpartition(".")
    names = next((names for names in TOGETHER if leaf in names), (leaf,))
    return [f"{parent}.{name}".removeprefix(".") for name in names]


def _global_amax(module: str, amax: Mapping[str, float], how: ZooQuantization, rng: np.random.Generator) -> float:
    """What the global scale of a matrix is for: never less than its largest, so that nothing is cut off."""
    fused = _together(module)
    if how.unify:
        return max(amax[other] for other in fused if other in amax)
    return amax[module] * APART[fused.index(module)] * rng.uniform(1.0, 1.2)


def _amax(weight: np.ndarray) -> float:
    return float(np.max(np.abs(weight.astype(np.float32))))


def _rng(name: str, seed: int, what: str) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(f"{name}\n{seed}\n{what}".encode()).digest()))


def _parts(weight: np.ndarray, scheme: Scheme, amax: float, input_amax: float) -> dict[str, np.ndarray]:
    """Leaf -> tensor of one matrix [N, K]."""
    leaves = scheme.leaves
    if scheme.weights == "fp8":
        scale = np.asarray(amax / E4M3_MAX, np.float32)
        codes = (weight.astype(np.float32) / scale).astype(ml_dtypes.float8_e4m3fn)
        input_scale = np.asarray(input_amax / E4M3_MAX, np.float32)
        return {leaves["codes"]: codes, leaves["global"]: scale, leaves["input"]: input_scale}
    found = quantize(weight, amax=amax, divide=scheme.divides)
    parts = {leaves["codes"]: found.packed, leaves["block"]: found.block_scale}
    parts[leaves["global"]] = np.asarray(found.global_scale, np.float32)
    if scheme.activations:
        scale = global_divisor(input_amax) if scheme.divides else global_scale(input_amax)
        parts[leaves["input"]] = np.asarray(scale, np.float32)
    return parts


def _left_alone(
    rules: Specs, plan: Mapping[str, TensorType], schemes: Mapping[str, Scheme], how: ZooQuantization
) -> list[str]:
    """The list of modules that are not quantised. Neither exporter says a word of the draft."""
    is_modelopt = how.spelling == "modelopt"
    found = set(how.exclude) if is_modelopt else set()
    for tensor, rule in rules.rules.items():
        module = tensor.removesuffix(".weight")
        is_matrix = len(rule.dims.split()) > 1 and module != tensor and (tensor in plan or rule.on == "head")
        if not is_matrix or rule.on == "mtp" or module in schemes or (is_modelopt and _matches(module, how.exclude)):
            continue
        if is_modelopt or (rule.on != "embedding" and len(rule.dims.split()) == 2):  # the other names Linears alone
            found.add(module)
    return sorted(found)
