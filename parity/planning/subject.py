"""The configuration to plan for: a checkpoint's, or that of a config.json alone, quantised on request."""

from __future__ import annotations

from loaders import CheckpointError
from loaders.config import config_from_json
from loaders.quantizable import config_documents
from loaders.quantization_config import KEY
from loaders.spec import ModelConfig
from parity.inspection import open_subject


def config_to_plan(path: str, quant: str | None) -> ModelConfig:
    """As ``load(path, quantize=quant)`` would have it.

    Raises:
        CheckpointError: it cannot be used, or is quantised already.
    """
    subject = open_subject(path)
    if quant is None:
        return subject.config
    if subject.config.quantization is not None:
        raise CheckpointError(path, [f"it is quantised already. Plan it without --quant {quant}."])
    inside, beside = config_documents(subject.config)
    config, problems = config_from_json(subject.document | {KEY: inside}, beside=beside, found=("config.json",))
    if config is None:
        raise CheckpointError(path, problems)
    return config
