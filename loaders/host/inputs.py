"""What a caller hands to a model, checked on the host before anything runs. Both backends and traces use it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loaders.digest import short_digest

if TYPE_CHECKING:
    from loaders.host.multimodal import VisionInputs
    from loaders.spec import ModelConfig


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """Checked inputs: int32 ``input_ids`` [B, T], bool ``attention_mask`` [B, T], int32 ``position_ids``.

    ``position_ids`` are [B, T], or [3, B, T]: time, height and width. ``vision``: images and videos among the tokens.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    position_ids: np.ndarray
    vision: VisionInputs | None = None

    @property
    def digest(self) -> str:
        """What tells them from others, with what they show: for processes that have to be given the same."""
        shown = () if self.vision is None else (self.vision.patches.pixels_AX, self.vision.slot_BT)
        return short_digest(self.input_ids, self.attention_mask, self.position_ids, *shown)

    def left_aligned(self) -> ModelInputs:
        """Every row's real tokens moved to its end, positions counted from 0: how generation keeps a ragged batch.

        Raises:
            ValueError: a row has no real token.
        """
        assert self.vision is None, "what is shown is placed after the rows are moved"
        empty = np.flatnonzero(~self.attention_mask.any(axis=1))
        if len(empty):
            raise ValueError(f"attention_mask: rows {empty.tolist()} have no real token; there is nothing to continue")
        ids, mask = (left_aligned(array, self.attention_mask) for array in (self.input_ids, self.attention_mask))
        return ModelInputs(np.where(mask, ids, 0).astype(np.int32), mask, positions_of(mask))

    def padded_to(self, length: int) -> ModelInputs:
        """At least ``length`` tokens a row, padding added on the left."""
        extra = max(length - self.input_ids.shape[1], 0)
        ids, mask, positions = self.input_ids, self.attention_mask, self.position_ids
        vision = None if self.vision is None else self.vision.left_padded(extra)
        return ModelInputs(*(left_padded(array, extra) for array in (ids, mask, positions)), vision=vision)


def left_aligned(array_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """Every row with its real tokens last, in their order."""
    order_BT = np.argsort(mask_BT, axis=1, kind="stable")  # False first, order kept
    return np.take_along_axis(array_BT, order_BT, axis=1)


def left_padded(array: np.ndarray, extra: int, value: int = 0) -> np.ndarray:
    """``extra`` more entries before those of the last axis."""
    before = ((0, 0),) * (array.ndim - 1)
    return np.pad(array, (*before, (extra, 0)), constant_values=value)


def positions_of(mask: np.ndarray) -> np.ndarray:
    """Positions counted over real tokens, int32; 0 where the mask is False."""
    return np.where(mask, np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)


def check_text(
    config: ModelConfig, input_ids: object, attention_mask: object = None, position_ids: object = None
) -> ModelInputs:
    """Check and complete what a caller gave.

    Args:
        config: of the model.
        input_ids: integers [B, T], each in [0, vocab_size).
        attention_mask: [B, T] of 0 and 1 (1 = real, padding on either side); None: all real.
        position_ids: integers [B, T], not negative; None: counted over the real tokens of each row. Where the rotary
            embedding has several axes also [3, B, T], or [4, B, T], whose first row, of text alone, is left out.
    Raises:
        ValueError: listing everything that is wrong.
    """
    ids = as_array("input_ids", input_ids)
    if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise ValueError(f"input_ids is {ids.dtype} {ids.shape}, expected integers [B, T] with B, T >= 1")
    problems = _unknown_ids("input_ids", ids, config)
    mask = np.ones(ids.shape, bool) if attention_mask is None else as_array("attention_mask", attention_mask)
    if mask.shape != ids.shape:
        problems.append(f"attention_mask has shape {mask.shape}, expected that of input_ids, {ids.shape}")
        mask = np.ones(ids.shape, bool)
    elif not np.isin(mask, (0, 1)).all():
        problems.append(f"attention_mask holds {mask[~np.isin(mask, (0, 1))][0]}, expected 0 (padding) or 1 (real)")
        mask = np.ones(ids.shape, bool)
    mask = mask.astype(bool)
    positions = positions_of(mask) if position_ids is None else as_array("position_ids", position_ids)
    shapes = [ids.shape, (3, *ids.shape), (4, *ids.shape)] if config.is_multi_axis else [ids.shape]
    if positions.shape not in shapes or positions.dtype.kind not in "iu":
        expected = " or ".join(map(str, shapes))
        problems.append(f"position_ids is {positions.dtype} {positions.shape}, expected integers {expected}")
    elif not _fit(positions):
        problems.append(f"position_ids holds {positions.min()} to {positions.max()}, expected 0 to {2**31 - 1}")
    if problems:
        raise ValueError("; ".join(problems))
    axes = positions[-3:] if positions.ndim == 3 else positions
    return ModelInputs(ids.astype(np.int32), mask, axes.astype(np.int32))


def check_next(config: ModelConfig, token_ids: object, *, rows: int) -> np.ndarray:
    """What a row each is continued by, int32 [B, 1].

    Raises:
        ValueError: they are no integers, not as many as there are rows, or outside [0, vocab_size).
    """
    ids = as_array("token_ids", token_ids)
    if ids.dtype.kind not in "iu":
        raise ValueError(f"token_ids is {ids.dtype} {ids.shape}, expected integers [B]")
    if ids.shape not in ((rows,), (rows, 1)):
        raise ValueError(f"{ids.size} tokens for a cache of {rows} rows, as {ids.shape}: expected [B] or [B, 1]")
    if problems := _unknown_ids("token_ids", ids, config):
        raise ValueError(problems[0])
    return ids.reshape(-1, 1).astype(np.int32)


def _unknown_ids(name: str, ids: np.ndarray, config: ModelConfig) -> list[str]:
    """What is wrong with token ids: some are none of this vocabulary."""
    bad = ids[(ids < 0) | (ids >= config.vocab_size)]
    return [f"{name} holds {bad.size} ids outside 0..{config.vocab_size - 1}, the first {bad[0]}"] if bad.size else []


def as_array(name: str, value: object) -> np.ndarray:
    """What a caller gave as NumPy has it.

    Raises:
        ValueError: its rows have different lengths, or NumPy cannot read it.
    """
    try:
        return np.asarray(value)
    except ValueError:
        how = "Pad them to one length, and say in attention_mask, as 0, where that is"
        raise ValueError(f"{name} has rows of different lengths, expected an array. {how}.") from None
    except TypeError as error:  # another framework's bfloat16, or its device's
        raise ValueError(
            f"{name} is a {type(value).__name__}, which NumPy cannot read: {error}. Give an array of NumPy."
        ) from error


def hole_problems(config: ModelConfig, mask_BT: np.ndarray) -> list[str]:
    """Why a cache, which leaves masked tokens out, would not say what all tokens at once do."""
    if not config.needs_whole_rows:
        return []
    started, ended = np.cumsum(mask_BT, axis=1) > 0, np.cumsum(mask_BT[:, ::-1], axis=1)[:, ::-1] > 0
    holes = np.argwhere(~mask_BT & started & ended)
    if not len(holes):
        return []
    row, step = holes[0]
    where = f"attention_mask masks {len(holes)} tokens among real ones, the first in row {row} at {step}"
    return [f"{where}: windows and states see them pass, and a cache leaves them out. Give rows without them"]


def _fit(positions: np.ndarray) -> bool:
    return bool((positions >= 0).all() and (positions < 2**31).all())


def check_values(inject: Mapping[str, Any] | None) -> dict[str, Any]:
    """Values to hand in, by path: arrays of whichever library as they are, anything else as NumPy has it.

    Raises:
        ValueError: listing what holds no numbers.
    """
    if inject is None:
        return {}
    if not isinstance(inject, Mapping):
        raise ValueError(f"inject is a {type(inject).__name__}, expected values by path")
    found = {path: value if hasattr(value, "dtype") else as_array(path, value) for path, value in inject.items()}
    problems = [
        f"{path} holds {value.dtype}"
        for path, value in found.items()
        if isinstance(value, np.ndarray) and (value.dtype.kind in "OUSMmc" or value.dtype.itemsize > 8)
    ]
    if problems:
        raise ValueError(f"cannot inject: {'; '.join(problems)}, expected numbers, real ones of 64 bits at most")
    return {path: _native(value) for path, value in found.items()}


def check_experts(config: ModelConfig, path: str, chosen: np.ndarray) -> None:
    """Raises ValueError where what is to be injected as a router's choice names experts that there are not."""
    experts = config.dims().get("E")
    if experts is None or not path.endswith(".gate") or chosen.dtype.kind not in "iu" or not chosen.size:
        return
    if chosen.min() < 0 or chosen.max() >= experts.size:
        span = f"{chosen.min()} to {chosen.max()}"
        raise ValueError(f"cannot inject: {path} names experts {span}, expected 0 to {experts.size - 1}")


def _native(value: Any) -> Any:
    """An array of NumPy in this machine's order of bytes; another one as it is."""
    is_foreign = isinstance(value, np.ndarray) and not value.dtype.isnative
    return value.astype(value.dtype.newbyteorder("=")) if is_foreign else value


def check_pairs(inputs: ModelInputs) -> None:
    """Raises ValueError where no row has two tokens, which is what a draft looks at."""
    if inputs.input_ids.shape[1] < 2:
        raise ValueError(f"input_ids is {inputs.input_ids.shape}; a draft needs a token and the one after it")


def bucket(tokens: int) -> int:
    """What programs are made for, prompts and slots of caches: few lengths, so that these share programs, none much
    longer than is asked for.

    16, 32, 64, then multiples of 128, or from 2048 on of a sixteenth of the next power of two.
    """
    # A step of XLA reads every slot there is, and a prompt's padding is computed, so that powers of two may cost twice
    # what is needed; here an eighth, or 128, is to spare at most, for eight programs where those have one. A TPU lays
    # 128 slots side by side.
    tokens = operator.index(tokens)
    power = max(16, 1 << (tokens - 1).bit_length())
    step = max(128, power // 16)
    return min(power, -(-tokens // step) * step)
