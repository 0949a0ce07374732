"""What a checkpoint, or a config.json alone, says of a model's size: stages, devices, and what quantisation saves.

A config.json without weights is enough: the family's table has every parameter's shape, and of quantised ones the
dtype; plain floats are counted as what it says, else as bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loaders import Checkpoint, CheckpointError, Stage, open_checkpoint
from loaders.axes import axes_of, param_cuts, replicated
from loaders.config import config_from_json
from loaders.dtypes import bits
from loaders.errors import brief, reason
from loaders.files.opening import CONFIG
from loaders.files.strict_json import BadJson, parse_object
from loaders.quantization.documents import DOCUMENT
from loaders.quantization.schemes import summary
from loaders.reading.plan import plan_load, specs_of
from loaders.sources import OpenFile, Source, open_source, small_file
from loaders.sources.positioned import LocalFile
from loaders.spec import ModelConfig, ParamSpec, Specs

PLAIN = "BF16"
_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", None: PLAIN}  # config.json's words


@dataclass(frozen=True)
class Subject:
    """What is inspected: a checkpoint, or a configuration without one."""

    where: str
    config: ModelConfig
    document: dict[str, Any]
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True)
class Devices:
    """How the weights of a stage are cut."""

    tensor: int = 1
    expert: int = 1


def open_subject(path: str) -> Subject:
    """A checkpoint, a directory or an address of config.json and no weights, or a config.json by any name.

    Raises:
        CheckpointError: it cannot be used; lists everything.
    """
    given = Path(path)
    try:
        if path.endswith(".safetensors"):
            problem = "this is one file of a checkpoint, expected its directory, or a config.json"
            raise CheckpointError(path, [problem])
        if "://" not in path and given.is_file():  # also where it is a link to elsewhere
            return _of_config(path, given.name, partial(LocalFile, given), open_source(given.absolute().parent))
        try:
            source, name = open_source(path), CONFIG
            names = source.names()
        except OSError:
            if "://" not in path or not path.endswith(".json"):
                raise
            name = path.rpartition("/")[2]
            source = open_source(path.removesuffix(name))
            return _of_config(path, name, partial(source.open, name), source)
        if name in names and not any(".safetensors" in one for one in names):
            return _of_config(path, name, partial(source.open, name), source)
    except OSError as error:
        raise CheckpointError(path, [f"cannot be opened: {reason(error)}"]) from error
    checkpoint = open_checkpoint(path)
    return Subject(str(checkpoint.source), checkpoint.config, checkpoint.config_document, checkpoint)


def _of_config(path: str, name: str, opened: Callable[[], OpenFile], source: Source) -> Subject:
    """Of a config.json alone. ``source``: where a document of its quantisation may lie beside it."""
    document = _object(path, name, opened)
    beside = _object(path, DOCUMENT, partial(source.open, DOCUMENT)) if DOCUMENT in source.names() else None
    # of no tensor is it said that the draft is quantised: exporters leave it alone, and do not say so
    config, problems = config_from_json(document, beside=beside)
    if config is None:
        raise CheckpointError(path, problems)
    return Subject(path, config, document)


def _object(path: str, name: str, opened: Callable[[], OpenFile]) -> dict[str, Any]:
    try:
        with opened() as file:
            return parse_object(small_file(file, file.opened.num_bytes))
    except BadJson as error:
        raise CheckpointError(path, [f"{name} {error}"]) from error
    except OSError as error:
        raise CheckpointError(path, [f"{name} cannot be read: {reason(error)}"]) from error


def stored_as(path: str, document: Mapping[str, Any]) -> str:
    """The safetensors dtype of plain floats, as a config.json has it in either spelling, at the top or of its text.

    Raises:
        CheckpointError: it is another than weights are stored in.
    """
    parts = [document, document.get("text_config")]
    found = [part.get(key) for part in parts if isinstance(part, dict) for key in ("dtype", "torch_dtype")]
    word = next((word for word in found if word is not None), None)
    name = word.removeprefix("torch.") if isinstance(word, str) else word
    if name is not None and not (isinstance(name, str) and name in _STORED):
        expected = ", ".join(known for known in _STORED if known)
        raise CheckpointError(path, [f"config.json: dtype is {brief(word)}, expected one of {expected}"])
    return _STORED[name]


def inspect_stage(subject: Subject, stage: Stage, devices: Devices) -> dict[str, Any]:
    """Parameters and bytes of one pipeline stage, and of each of its devices.

    Raises:
        CheckpointError: the checkpoint does not fit its own config.
        ValueError: more stages than layers.
    """
    layers = stage.layers(subject.config.num_hidden_layers)
    found: dict[str, Any] = {"stage": stage.index, "layers": [layers.start, layers.stop]}
    if subject.checkpoint is None:
        specs, plain = specs_of(subject.config, stage), stored_as(subject.where, subject.document)
        dtypes = {spec.name: spec.dtype or plain for spec in specs}
        tensors = {"tensors_loaded": sum(len(spec.placements) for spec in specs)}
    else:
        plan = plan_load(subject.checkpoint, stage)
        specs, dtypes, report = plan.specs, plan.dtypes, plan.report()
        tensors = {
            "tensors_loaded": report.num_tensors,
            "tensors_verified": list(report.verified),
            "tensors_left_out": list(report.left_out),
            "tensors_of_other_stages": report.other_stages,
        }
    sizes = {spec.name: math.prod(spec.shape) * bits(dtypes[spec.name]) // 8 for spec in specs}
    found |= {"parameters": len(specs.params), "bytes": sum(sizes.values())} | tensors
    share, replicated = _cutting(subject.config, specs, devices)
    if devices != Devices():
        per_device = sum(size // share(spec) for spec, size in ((spec, sizes[spec.name]) for spec in specs))
        found |= {"bytes_per_device": per_device, "replicated": replicated}
    if subject.config.quantization is not None:
        found["quantised"] = _quantized(specs, sizes, share) | {"left_alone": _left_alone(specs)}
    return found


def _left_alone(specs: Specs) -> list[str]:
    """Modules of matrices that could be quantised, or would be if they were no routers, and are not."""
    return [
        tensor.removesuffix(".weight")
        for tensor, rule in specs.rules.items()
        if rule.dtype is None and (rule.is_linear or rule.is_router)
    ]


def _quantized(specs: Specs, sizes: Mapping[str, int], share: Callable[[ParamSpec], int]) -> dict[str, Any]:
    """Bytes of the quantised weights and their scales, against bfloat16, and of the block scales on each device."""
    # of a bfloat16 weight: half a byte of codes for 2, or one of fp8
    times = {"codes": 4, "fp8": 2}
    roles = {spec.name: _role(spec) for spec in specs if spec.dtype is not None}
    held = sum(sizes[name] for name in roles)
    plain = sum(sizes[name] * times.get(role, 0) for name, role in roles.items())
    blocks = sum(sizes[spec.name] // share(spec) for spec in specs if roles.get(spec.name) == "block scales")
    return {"bytes": held, "bytes_in_bfloat16": plain, "bytes_saved": plain - held, "block_scale_bytes": blocks}


def _role(spec: ParamSpec) -> str:
    axis = spec.axes[-1] if spec.axes else ""
    if axis.endswith("/2"):
        return "codes"
    if axis.endswith("/16"):
        return "block scales"
    return "fp8" if spec.dtype == "F8_E4M3" else "scalars"


def _cutting(config: ModelConfig, specs: Specs, devices: Devices) -> tuple[Callable[[ParamSpec], int], list[str]]:
    """In how many parts a parameter is cut, and which are whole on every device though they might be cut."""
    if devices == Devices():
        return (lambda spec: 1), []
    sizes, dims = {"expert": devices.expert, "tensor": devices.tensor}, config.dims()

    def share(spec: ParamSpec) -> int:
        return math.prod(sizes[axis] for cut in param_cuts(spec, dims, sizes) for axis in axes_of(cut))

    return share, replicated(specs.params, dims, sizes)


def quantisation(subject: Subject) -> dict[str, Any] | str:
    """How many modules have which scheme, and whether keys and values are rounded; of a plain model ``none``."""
    quantization = subject.config.quantization
    if quantization is None:
        return "none"
    return {
        "format": quantization.spelling,
        "schemes": {scheme: len(modules) for scheme, modules in summary(quantization).items()},
        "kv_cache": {"scaled": "FP8", "cast": "FP8 without scales", None: "as computed"}[quantization.kv_cache],
    }
