"""Rows of tokens as generation reads them: what stands before, at once, and the last tokens one by one; and back."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loaders.host.inputs import ModelInputs, hole_problems
from loaders.host.multimodal import TEXT, TYPES, placeholders, shown_of
from loaders.spec import ModelConfig


@dataclass(frozen=True)
class Stepwise:
    """Rows [B, T] whose last N real tokens are read one at a time, after a prompt of those before them.

    Attributes:
        input_ids: of the prompts, integers [B, T - N], every row's real tokens at its end.
        attention_mask: of the prompts, bool [B, T - N].
        multimodal: what the prompts show, under a processor's names.
        token_NB: what is read then, a token of each row at every step.
        order_BT: where each token of the rows moved to their ends was given.
        place_BT: and back: which of the moved ones each given token is.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    multimodal: dict[str, Any]
    token_NB: np.ndarray
    order_BT: np.ndarray
    place_BT: np.ndarray

    def handed(self, inject: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """Values by path of the rows as given, [B, T, ...]: those of the prompts, [B, T - N, ...], and of each step.

        Of NumPy, JAX or torch, as what is returned.

        Raises:
            ValueError: values of another number of rows or tokens; lists all of them.
        """
        length, (rows, tokens) = self.input_ids.shape[1], self.order_BT.shape
        values = inject or {}
        problems = [
            f"{path} is {tuple(value.shape)}, expected ({rows}, {tokens}, ...)"
            for path, value in values.items()
            if tuple(value.shape[:2]) != (rows, tokens)
        ]
        if problems:
            raise ValueError(f"cannot inject: {'; '.join(problems)}")
        moved = {path: value[self._rows(), self.order_BT] for path, value in values.items()}
        places = [slice(0, length), *(slice(step, step + 1) for step in range(length, tokens))]
        return [{path: value[:, place] for path, value in moved.items()} for place in places]

    def back(self, moved: Any) -> Any:
        """Values of prompts and steps joined, [B, T, ...], each where its token was given."""
        return moved[self._rows(), self.place_BT]

    def _rows(self) -> np.ndarray:
        return np.arange(len(self.order_BT))[:, None]


def stepwise(
    config: ModelConfig,
    checked: ModelInputs,
    input_ids: Any,
    *,
    position_ids: Any,
    given: Mapping[str, Any],
    steps: int,
) -> Stepwise:
    """Cut rows before their last ``steps`` real tokens.

    Args:
        config: of the model.
        checked: the rows, as ``check_inputs`` found them.
        input_ids: integers [B, T] as given: placeholders may be any number.
        position_ids: as given.
        given: images and videos, under a processor's names.
        steps: at least 1.
    Raises:
        ValueError: listing everything that is wrong: positions that a cache would not count so, rows too short, an
            image among the last tokens.
    """
    if not isinstance(steps, numbers.Integral) or isinstance(steps, bool):
        raise ValueError(f"decode={steps!r}, expected an integer")
    mask_BT = checked.attention_mask
    order_BT = np.argsort(mask_BT, axis=1, kind="stable")  # that of ``left_aligned``
    ids_BT = np.take_along_axis(np.where(mask_BT, np.asarray(input_ids), 0), order_BT, axis=1)
    shown = shown_of(given, ids_BT.shape)
    problems = []
    if position_ids is not None:
        problems.append("position_ids were given, but a cache counts them: leave them out")
    tokens_B = mask_BT.sum(axis=1)
    least = int(tokens_B.min())
    if not 1 <= steps < least:
        where = f"row {int(tokens_B.argmin())} has {least} real tokens, and one must be left as its prompt"
        bounds = f"expected 1 to {least - 1}: {where}" if least > 1 else f"but {where}"
        problems.append(f"decode={steps}, {bounds}")
    problems += hole_problems(config, mask_BT)
    if shown and config.vision is not None:
        types_BT, _ = placeholders(config.vision, np.asarray(input_ids), shown.get(TYPES))
        types_BT = np.take_along_axis(types_BT, order_BT, axis=1)
        if (late := np.flatnonzero((types_BT[:, -steps:] != TEXT).any(axis=1))).size:
            problems.append(f"the last {steps} tokens of rows {late.tolist()} show something: only text is decoded")
        shown |= {TYPES: types_BT[:, :-steps]}
    if problems:
        raise ValueError("; ".join(problems))
    return Stepwise(
        input_ids=ids_BT[:, :-steps],
        attention_mask=np.take_along_axis(mask_BT, order_BT, axis=1)[:, :-steps],
        multimodal=shown,
        token_NB=ids_BT[:, -steps:].T,
        order_BT=order_BT,
        place_BT=np.argsort(order_BT, axis=1),
    )


def in_all(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names that prompts and every step have, in the order of the first."""
    return [name for name in found[0] if all(name in step for step in found)]
