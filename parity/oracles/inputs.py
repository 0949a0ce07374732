"""What goes into the oracle, checked before it can wrap or broadcast."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from loaders.spec import ModelConfig
from parity.backend import counted


def checked_inputs(
    config: ModelConfig,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None,
    position_ids: np.ndarray | None,
    shown: Mapping[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids and positions as integers and the mask as bool, all [B, T]; positions also [3, B, T] where they may.

    Positions may be [4, B, T] there: the first row is of text alone and turns nothing. Where something is shown, the
    number of a placeholder means nothing.

    Raises:
        ValueError: not integers [B, T], an id outside the vocabulary, or a mask that holds something but 0 and 1.
    """
    ids_BT = _integers("input_ids", input_ids)
    if ids_BT.ndim != 2 or not ids_BT.size:
        raise ValueError(f"input_ids has shape {ids_BT.shape}, expected [B, T] with at least one token")
    text = ids_BT[~_placeholders(config, ids_BT, shown)]
    if text.size and (text.min() < 0 or text.max() >= config.vocab_size):
        raise ValueError(f"input_ids spans {text.min()} to {text.max()}, expected 0 to {config.vocab_size - 1}")
    mask_BT = np.ones(ids_BT.shape, np.int64)
    if attention_mask is not None:
        mask_BT = _integers("attention_mask", counted(attention_mask), ids_BT.shape)
    if not np.isin(mask_BT, (0, 1)).all():
        raise ValueError("attention_mask holds other values than 0 and 1; the oracle takes no additive masks")
    if position_ids is None:
        positions = np.maximum(np.cumsum(mask_BT, axis=1) - 1, 0)
    else:
        axes = ()
        if config.is_multi_axis and np.ndim(position_ids) == 3:
            axes = (4,) if len(position_ids) == 4 else (3,)
        positions = _integers("position_ids", position_ids, (*axes, *ids_BT.shape))
        positions = positions[1:] if axes == (4,) else positions
    return ids_BT, mask_BT.astype(np.bool_), positions


def _placeholders(config: ModelConfig, ids_BT: np.ndarray, shown: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which tokens stand for something shown, bool [B, T]: theirs may be any number."""
    if not shown:
        return np.zeros(ids_BT.shape, bool)
    if config.vision is None:
        raise ValueError(f"{sorted(shown)} given, but {config.architecture} sees nothing")
    if "mm_token_type_ids" in shown:
        return _integers("mm_token_type_ids", shown["mm_token_type_ids"], ids_BT.shape) > 0
    return np.isin(ids_BT, (config.vision.image_token_id, config.vision.video_token_id))


def checked_routing(
    config: Any, routing: Mapping[str, np.ndarray], mask_BT: np.ndarray, *, mtp: bool = False
) -> dict[str, np.ndarray]:
    """Experts [B, T, X] to replay, by the names the oracle gives its own; of the draft, if it runs, [B, T-1, X].

    Raises:
        ValueError: a name that is no sparse layer's, or at a real token an expert twice or one that does not exist.
    """
    if not routing:
        return {}
    if "E" not in config.dims():
        raise ValueError(f"routing {sorted(routing)} given, but {config.architecture} has no experts")
    sparse = _sparse(config, mtp=mtp)
    unknown = sorted(set(routing) - set(sparse))
    if unknown:
        raise ValueError(f"routing {unknown} is of no sparse layer. They are {sparse}.")
    return {name: _experts(config, name, given, mask_BT) for name, given in routing.items()}


def replayable(
    config: Any, routing: Mapping[str, np.ndarray], mask_BT: np.ndarray, *, mtp: bool = False
) -> dict[str, np.ndarray]:
    """Of what a model says its routers chose, that which ``checked_routing`` takes.

    A router that gives a token too few experts, or one of them twice, is wrong: its layer must be chosen for freely, so
    that the comparison can say so.
    """
    known = _sparse(config, mtp=mtp) if "E" in config.dims() else []
    found: dict[str, np.ndarray] = {}
    for name, given in routing.items():
        if name in known:
            with contextlib.suppress(ValueError):
                found[name] = _experts(config, name, given, mask_BT)
    return found


def _sparse(config: Any, *, mtp: bool) -> list[str]:
    """What the oracle calls the routing of every sparse layer."""
    layers = [f"routing.{layer + 1}" for layer in range(config.num_hidden_layers) if config.is_sparse(layer)]
    return layers + (["mtp.routing.1"] if mtp else [])


def _experts(config: Any, name: str, given: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """Experts of one layer. Raises ValueError as ``checked_routing`` says."""
    is_real = mask_BT[:, 1:] & mask_BT[:, :-1] if name.startswith("mtp.") else mask_BT
    experts = _integers(name, given, (*is_real.shape, config.num_experts_per_tok))
    real = np.sort(experts[is_real], axis=-1)
    if (real < 0).any() or (real >= config.num_experts).any():
        raise ValueError(f"{name} names experts outside 0 to {config.num_experts - 1}")
    if (real[:, 1:] == real[:, :-1]).any():
        raise ValueError(f"{name} gives a token the same expert twice")
    return experts


def _integers(name: str, given: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    array = np.asarray(given)
    if array.dtype.kind not in "biu" or (shape is not None and array.shape != shape):
        expected = "integers" if shape is None else f"integers {shape}"
        raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {expected}")
    return array.astype(np.int64)
