"""What there is to quantise in a plain checkpoint, and what ModelOpt writes of it: names, tensors and documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from loaders import dtypes
from loaders.checkpoint import Checkpoint
from loaders.expand import NOTHING, Shaped, expand
from loaders.families import family_module
from loaders.files.header import TensorInfo
from loaders.quantization.patterns import FUSED
from loaders.quantization.rules import EXPERTS
from loaders.quantization.schemes import BLOCK, Scheme
from loaders.spec import ModelConfig, Rule, Specs
from loaders.stage import Stage

VERSION = "0.1.0"


@dataclass(frozen=True)
class Matrix:
    """A matrix to quantise: its module in the result, and where it lies in the plain checkpoint.

    Matrices of one ``group`` share their global scale, since engines multiply them as one: q, k and v; gate and up.
    """

    module: str
    tensor: str
    group: str
    rows: slice | None = None  # of an expert in a fused tensor
    expert: int | None = None
    is_transposed: bool = False  # the fused tensor has inputs before outputs

    def of(self, array: np.ndarray) -> np.ndarray:
        """A view of it, in its plain tensor."""
        if self.rows is None:
            return array
        expert = array[self.expert]
        return (expert.T if self.is_transposed else expert)[self.rows]


def matrices_of(checkpoint: Checkpoint) -> tuple[dict[str, Matrix], dict[str, str]]:
    """What to quantise, by module; and the modules of matrices that stay as they are, with the reason."""
    tensors = checkpoint.tensors
    specs, left = _left_alone(checkpoint.config, tensors)
    found: dict[str, Matrix] = {}
    for tensor, rule in specs.rules.items():
        module = tensor.removesuffix(".weight")
        if tensor not in tensors or _exporters_name(tensor) in left:
            continue
        if rule.is_fused:
            found |= {one.module: one for one in _of_fused(tensor, tensors[tensor], rule)}
        elif rule.is_linear:
            found[module] = Matrix(module, tensor, _group(module))
    return found, left


def config_documents(config: ModelConfig) -> tuple[dict, dict]:
    """``documents`` of a model of which there is no checkpoint yet: weights alone in NVFP4, as ``load`` makes them."""
    return documents(Scheme("nvfp4", activations=False), sorted(_left_alone(config, NOTHING)[1]))


def _left_alone(config: ModelConfig, tensors: Mapping[str, Shaped]) -> tuple[Specs, dict[str, str]]:
    """What the model is made of, and the modules of matrices that stay as they are, with the reason."""
    stage = Stage(mtp=bool(config.num_mtp_layers))
    specs = expand(family_module(config.architecture).RULES, config, stage, tensors)
    shapes = {placement.tensor: spec.tensor_shape for spec in specs for placement in spec.placements}
    reasons = {tensor: _reason(rule, shapes.get(tensor, ())) for tensor, rule in specs.rules.items()}
    # the experts of a layer are quantised all or none
    return specs, {_exporters_name(tensor): reason for tensor, reason in reasons.items() if reason}


def _exporters_name(tensor: str) -> str:
    """What a tensor's module is called in a list of modules to leave alone: all experts of a layer by one name."""
    before, experts, _ = tensor.rpartition(f"{EXPERTS}.")
    return before + EXPERTS if experts else tensor.removesuffix(".weight")


def _reason(rule: Rule, shape: tuple[int, ...]) -> str | None:
    """Why a matrix is left alone; None: it is not, or there is no matrix."""
    if rule.on == "embedding":
        return "the embedding"
    if rule.is_visual:
        return "the vision tower" if rule.tensor.endswith(".weight") and len(shape) > 1 else None
    if rule.on == "head":
        return "the head"
    if rule.is_router or rule.is_gate:
        return "a router" if rule.is_router else "a gate of few outputs"
    if not rule.is_linear and not rule.is_fused:
        return "a convolution" if rule.tensor.endswith(".weight") and len(shape) > 1 else None
    if rule.on == "mtp":
        return "the draft"
    inputs = shape[-2 if rule.form == "fused transposed" else -1]
    return f"{inputs} inputs, no multiple of {BLOCK}" if inputs % BLOCK else None


def _of_fused(tensor: str, info: TensorInfo, rule: Rule) -> list[Matrix]:
    """The experts of one tensor, under the names that exporters give them one by one."""
    prefix, _, stack = tensor.rpartition(".")
    names = FUSED.get(stack, (stack,))
    is_transposed = rule.form == "fused transposed"
    size = info.shape[2 if is_transposed else 1] // len(names)
    return [
        Matrix(module, tensor, _group(module), slice(part * size, (part + 1) * size), expert, is_transposed)
        for expert in range(info.shape[0])
        for part, name in enumerate(names)
        for module in [f"{prefix}.{expert}.{name}"]
    ]


def _group(module: str) -> str:
    parent, _, leaf = module.rpartition(".")
    fused = next((name for name, parts in FUSED.items() if leaf in parts), leaf)
    return f"{parent}.{fused}"


def infos(checkpoint: Checkpoint, matrix: Matrix, scheme: Scheme) -> dict[str, TensorInfo]:
    info = checkpoint.tensors[matrix.tensor]
    rows = info.shape[-2] if matrix.rows is None else matrix.rows.stop - matrix.rows.start
    columns = info.shape[-2 if matrix.is_transposed else -1]
    shapes = {"codes": (rows, columns // 2), "block": (rows, columns // BLOCK), "global": (), "input": ()}
    kinds = {"codes": "U8", "block": "F8_E4M3", "global": "F32", "input": "F32"}
    return {
        f"{matrix.module}.{leaf}": TensorInfo(
            kinds[role], shapes[role], info.file, (0, int(np.prod(shapes[role])) * dtypes.bits(kinds[role]) // 8)
        )
        for role, leaf in scheme.leaves.items()
    }


def documents(scheme: Scheme, excluded: list[str]) -> tuple[dict, dict]:
    """``quantization_config`` and hf_quant_config.json, as ModelOpt writes them."""
    algorithm = "NVFP4" if scheme.activations else "W4A16_NVFP4"
    producer = {"name": "tandem", "version": VERSION}
    four_bits = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    group = ({"input_activations": four_bits} if scheme.activations else {}) | {"weights": four_bits}
    inside = {
        "config_groups": {"group_0": group | {"targets": ["Linear"]}},
        "ignore": excluded,
        "quant_algo": algorithm,
        "producer": producer,
        "quant_method": "modelopt",
    }
    quantization = {"quant_algo": algorithm, "kv_cache_quant_algo": None, "group_size": BLOCK}
    return inside, {"producer": producer, "quantization": quantization | {"exclude_modules": excluded}}
