"""What to plan for: a checkpoint, or a config.json alone, quantised on request, and what its weights are stored in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from loaders import CheckpointError, Stage
from loaders.config import config_from_json
from loaders.quantization.documents import KEY
from loaders.quantization.quantizable import config_documents
from loaders.quantization.schemes import BLOCK
from loaders.reading.plan import compute_dtype, plan_load, specs_of
from loaders.spec import ModelConfig
from parity.inspection import PLAIN, Subject, open_subject, stored_as


@dataclass(frozen=True)
class Planned:
    """A configuration, and what weights are stored in.

    Attributes:
        config: as ``load(path, quantize=)`` would have it.
        dtype: what ``load`` would compute in.
        plain: safetensors dtype of most weights that are neither codes nor scales.
        stored: of those that have another, by parameter.
    """

    config: ModelConfig
    dtype: str
    plain: str
    stored: dict[str, str]


def planned(path: str, quant: str | None) -> Planned:
    """A checkpoint's weights are stored in what its files say, of a config.json alone in its ``dtype``, else bfloat16.

    Raises:
        CheckpointError: it cannot be used, or is quantised already, or there is nothing in it to quantise; or a
            config.json alone has another ``dtype``.
    """
    subject = open_subject(path)
    config = _quantized(path, subject, quant)
    if subject.checkpoint is None:
        plain = stored_as(path, subject.document)
        return Planned(config, "bfloat16" if plain == "BF16" else "float32", plain, {})
    plan = plan_load(subject.checkpoint, Stage())
    found = {spec.name: plan.dtypes[spec.name] for spec in plan.specs if spec.dtype is None}
    plain = Counter(found.values()).most_common(1)[0][0] if found else PLAIN
    others = {name: dtype for name, dtype in found.items() if dtype != plain}
    return Planned(config, compute_dtype(None, plan), plain, others)


def _quantized(path: str, subject: Subject, quant: str | None) -> ModelConfig:
    if quant is None:
        return subject.config
    if subject.config.quantization is not None:
        raise CheckpointError(path, [f"it is quantised already. Plan it without --quant {quant}."])
    inside, beside = config_documents(subject.config)
    config, problems = config_from_json(subject.document | {KEY: inside}, beside=beside)
    if config is None:
        raise CheckpointError(path, problems)
    if not specs_of(config, Stage()).schemes:
        raise CheckpointError(path, [f"no linear layer has a multiple of {BLOCK} inputs: nothing to quantise"])
    return config
