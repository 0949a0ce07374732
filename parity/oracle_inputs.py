"""What goes into the oracle: weights widened to float64 and arguments checked before they can wrap or broadcast."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from loaders import Checkpoint, CheckpointError
from loaders.qwen3 import Qwen3Config, Qwen3MoeConfig

EXACT_IN_FLOAT64 = ("F64", "F32", "F16", "BF16")


def stored(checkpoint: Checkpoint, name: str, *shape: int) -> np.ndarray:
    """A tensor as it is stored, ``shape`` being what config.json asks for.

    Raises:
        CheckpointError: it is missing, has another shape, or a dtype whose values mean nothing without scales.
    """
    info = checkpoint.tensors.get(name)
    if info is None:
        raise CheckpointError(
            checkpoint.source, [f"tensor {name!r} is missing. Is config.json from the same checkpoint?"]
        )
    if info.shape != shape:
        problem = f"tensor {name!r} has shape {info.shape}, expected {shape} ({info.file})"
        raise CheckpointError(checkpoint.source, [f"{problem}. Is config.json from the same checkpoint?"])
    if info.dtype not in EXACT_IN_FLOAT64:
        known = ", ".join(EXACT_IN_FLOAT64)
        raise CheckpointError(checkpoint.source, [f"tensor {name!r} is {info.dtype}; the oracle widens {known} only"])
    return checkpoint.read(name)


def widened(checkpoint: Checkpoint, prefix: str, name: str, *shape: int) -> np.ndarray:
    """The tensor ``prefix + name`` in float64, every value exact; errors as ``stored``."""
    return stored(checkpoint, prefix + name, *shape).astype(np.float64)


def checked_config(checkpoint: Checkpoint) -> Qwen3Config:
    """The checkpoint's configuration, of a family this oracle implements.

    Raises:
        ValueError: it is of another family.
    """
    if not isinstance(checkpoint.config, Qwen3Config):
        raise ValueError(f"the oracle does not implement {checkpoint.config.architecture}")
    return checkpoint.config


def checked_inputs(
    config: Qwen3Config, input_ids: np.ndarray, attention_mask: np.ndarray | None, position_ids: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids and positions as integers and the mask as bool, all [B, T].

    Raises:
        ValueError: not integers [B, T], an id outside the vocabulary, or a mask that holds something but 0 and 1.
    """
    ids_BT = _integers("input_ids", input_ids)
    if ids_BT.ndim != 2 or not ids_BT.size:
        raise ValueError(f"input_ids has shape {ids_BT.shape}, expected [B, T] with at least one token")
    if ids_BT.min() < 0 or ids_BT.max() >= config.vocab_size:
        raise ValueError(f"input_ids spans {ids_BT.min()} to {ids_BT.max()}, expected 0 to {config.vocab_size - 1}")
    mask_BT = np.ones(ids_BT.shape, np.int64)
    if attention_mask is not None:
        mask_BT = _integers("attention_mask", attention_mask, ids_BT.shape)
    if not np.isin(mask_BT, (0, 1)).all():
        raise ValueError("attention_mask holds other values than 0 and 1; the oracle takes no additive masks")
    if position_ids is None:
        positions_BT = np.maximum(np.cumsum(mask_BT, axis=1) - 1, 0)
    else:
        positions_BT = _integers("position_ids", position_ids, ids_BT.shape)
    return ids_BT, mask_BT.astype(np.bool_), positions_BT


def checked_routing(
    config: Qwen3Config, routing: Mapping[str, np.ndarray], mask_BT: np.ndarray
) -> dict[str, np.ndarray]:
    """Experts [B, T, X] to replay, by the names the oracle gives its own.

    Raises:
        ValueError: a name that is no sparse layer's, or at a real token an expert twice or one that does not exist.
    """
    if not routing:
        return {}
    if not isinstance(config, Qwen3MoeConfig):
        raise ValueError(f"routing {sorted(routing)} given, but {config.architecture} has no experts")
    sparse = [f"routing.{layer + 1}" for layer in range(config.num_hidden_layers) if config.is_sparse(layer)]
    unknown = sorted(set(routing) - set(sparse))
    if unknown:
        raise ValueError(f"routing {unknown} is of no sparse layer. They are {sparse}.")
    checked: dict[str, np.ndarray] = {}
    for name, given in routing.items():
        experts_BTX = _integers(name, given, (*mask_BT.shape, config.num_experts_per_tok))
        real = np.sort(experts_BTX[mask_BT], axis=-1)
        if (real < 0).any() or (real >= config.num_experts).any():
            raise ValueError(f"{name} names experts outside 0 to {config.num_experts - 1}")
        if (real[:, 1:] == real[:, :-1]).any():
            raise ValueError(f"{name} gives a token the same expert twice")
        checked[name] = experts_BTX
    return checked


def _integers(name: str, given: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    array = np.asarray(given)
    if array.dtype.kind not in "biu" or (shape is not None and array.shape != shape):
        expected = "integers" if shape is None else f"integers {shape}"
        raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {expected}")
    return array.astype(np.int64)
