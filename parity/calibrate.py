"""What the inputs of linear layers amount to: measured with the float64 oracle, on text or token ids of the user's own.

The scale of a layer's inputs is the largest magnitude it saw, as ModelOpt's ``max`` calibration has it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loaders import Checkpoint, CheckpointError
from parity.oracle import oracle_forward
from parity.record import read_inputs

ROW_TOKENS = 512  # what text is cut into; a model sees no further back while it is calibrated
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Calibration:
    """Largest magnitude of every module's input, and where it is not from.

    Attributes:
        amax: by module.
        unseen: experts that no token reached; they have the largest amax of that projection in their layer.
        tokens: how many were looked at.
    """

    amax: dict[str, float]
    unseen: tuple[str, ...]
    tokens: int


def calibrate(
    checkpoint: Checkpoint, rows: Iterable[Mapping[str, np.ndarray]], modules: Collection[str]
) -> Calibration:
    """Run ``rows`` through the oracle and take note of the inputs of ``modules``.

    Args:
        checkpoint: not quantised.
        rows: inputs [1, T] without padding, see ``rows_of``.
        modules: whose inputs are wanted; an expert's is ``...mlp.experts.3.gate_proj``, however it is stored.
    Raises:
        ValueError: there are no rows, or bad ones.
        CheckpointError: the checkpoint cannot be run.
    """
    seen: dict[str, float] = {}
    tokens = 0

    def saw(module: str, x: np.ndarray) -> None:
        largest = float(np.max(np.abs(x), initial=0.0))
        if not np.isfinite(largest):
            problem = f"the inputs of {module} hold NaN or infinity on these rows, and NVFP4 has neither"
            raise CheckpointError(checkpoint.source, [f"{problem}. Do its weights?"])
        seen[module] = max(seen.get(module, 0.0), largest)

    for row in rows:
        tokens += row["input_ids"].size
        oracle_forward(checkpoint, row["input_ids"], position_ids=row.get("position_ids"), saw=saw)
    if not tokens:
        raise ValueError("there is not one token to calibrate with")
    unseen = tuple(module for module in modules if module not in seen)
    of_experts: dict[tuple[str, str], float] = {}
    for module, amax in seen.items():
        if (others := _projection(module)) is not None:
            of_experts[others] = max(of_experts.get(others, 0.0), amax)
    filled = {module: of_experts[others] for module in unseen if (others := _projection(module)) in of_experts}
    amax = {module: seen[module] for module in modules if module in seen} | filled
    return Calibration(amax, tuple(filled), tokens)


def _projection(module: str) -> tuple[str, str] | None:
    """The experts a module is one of, and which of their projections it is; None: it is no expert's."""
    before, experts, rest = module.rpartition(".experts.")
    return (before, rest.rpartition(".")[2]) if experts else None


def rows_of(checkpoint: Checkpoint, path: str | os.PathLike[str]) -> Iterator[dict[str, np.ndarray]]:
    """The rows of an inputs file (.safetensors), without their padding; or of any other file, read as text.

    Raises:
        ValueError: the file is not what its name says, or text cannot be tokenised here.
        OSError: it cannot be read.
    """
    if Path(path).suffix != ".safetensors":
        longest = min(ROW_TOKENS, checkpoint.config.max_position_embeddings)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            told = f"{path} is not text in UTF-8 ({error}), and its name does not end in .safetensors"
            raise ValueError(f"{told}. Give text, or an inputs file by that name.") from error
        ids = token_ids(checkpoint, text)
        for start in range(0, len(ids), longest):
            yield {"input_ids": np.array([ids[start : start + longest]], np.int64)}
        return
    inputs = read_inputs(path)
    if shown := sorted(inputs.keys() - {"input_ids", "attention_mask", "position_ids"}):
        raise ValueError(f"{path} holds {', '.join(shown)}, and layers are calibrated on text alone. Leave them out.")
    ids_BT = inputs["input_ids"]
    mask_BT = np.asarray(inputs.get("attention_mask", np.ones(ids_BT.shape, np.int64))).astype(bool)
    if ids_BT.ndim != 2 or mask_BT.shape != ids_BT.shape:
        raise ValueError(f"{path}: input_ids {ids_BT.shape} and attention_mask {mask_BT.shape}, expected both [B, T]")
    if (given := inputs.get("position_ids")) is not None and given.shape[-2:] != ids_BT.shape:
        raise ValueError(f"{path}: position_ids {given.shape}, expected those of input_ids {ids_BT.shape}")
    for row, is_real in enumerate(mask_BT):
        found = {name: array[..., row, :][..., is_real] for name, array in inputs.items() if name != "attention_mask"}
        if is_real.any():
            yield {name: array[..., None, :] for name, array in found.items()}


def token_ids(checkpoint: Checkpoint, text: str) -> list[int]:
    """``text`` in tokens of the checkpoint's own tokenizer.json.

    Raises:
        ValueError: it has none, it cannot be read, or the library that reads it is not installed.
    """
    instead = "Or give token ids: a .safetensors file as `tandem record --inputs` takes."
    if TOKENIZER not in checkpoint.source.names():
        raise ValueError(f"{checkpoint.source} has no {TOKENIZER} to read text with. Put it there. {instead}")
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ValueError(f"text needs the package tokenizers: pip install tokenizers. {instead}") from error
    reader: Any = tokenizers.Tokenizer
    try:
        tokenizer = reader.from_str(checkpoint.source.read_file(TOKENIZER).decode())
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise ValueError(f"{checkpoint.source}: {TOKENIZER} cannot be read: {error}. {instead}") from error
    return list(tokenizer.encode(text).ids)
