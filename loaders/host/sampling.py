"""How a batch is continued: how far, how each token is chosen, and what ends a row. Both backends take it from here."""

from __future__ import annotations

import numbers
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_TOKENS = 2**31 - 1  # positions are int32
MOST_WARMTH = float(np.finfo(np.float32).max)
DRAFT_TOKENS = 3  # in a round, where nobody says
NO_TOKEN = -1  # of logits that none can be chosen from


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What ``generate`` is asked for, checked as it is made.

    Attributes:
        max_new_tokens: at most so many per row.
        temperature: 0 = the best token; else the softmax temperature.
        top_k: sample among the best k only; None: all.
        top_p: sample among the best tokens that together reach this probability, in (0, 1]; None: all.
        seed: of the draws, 0 to 2**63 - 1.
        ignore_eos: go on after an end-of-sequence token.
        draft_tokens: guesses in each round of a draft; None: there is no draft.
    Raises:
        ValueError: listing every option that is of another kind or out of range.
    """

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    ignore_eos: bool
    draft_tokens: int | None = None

    def __post_init__(self) -> None:
        problems = _whole("max_new_tokens", self.max_new_tokens, 1, MOST_TOKENS)
        problems += [] if self.draft_tokens is None else _whole("draft_tokens", self.draft_tokens, 1)
        warmth, share = _number(self.temperature), None if self.top_p is None else _number(self.top_p)
        if warmth is None or (warmth != 0 and not 1e-5 <= warmth <= MOST_WARMTH):
            problems.append(f"temperature={self.temperature!r}, expected 0, or 1e-5 and more, as float32 holds it")
        problems += [] if self.top_k is None else _whole("top_k", self.top_k, 1)
        if self.top_p is not None and (share is None or not 0 < share <= 1):
            problems.append(f"top_p={self.top_p!r}, expected in (0, 1]")
        problems += _whole("seed", self.seed, 0, 2**63 - 1)
        if not isinstance(self.ignore_eos, bool | np.bool_):
            problems.append(f"ignore_eos={self.ignore_eos!r}, expected True or False")
        if problems:
            raise ValueError("; ".join(problems))
        object.__setattr__(self, "temperature", warmth)  # floats of whichever library they were
        object.__setattr__(self, "top_p", share)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def nucleus(self) -> float:
        """The probability that the tokens to choose from reach together: ``top_p``, or all of it."""
        return 1.0 if self.top_p is None else self.top_p


def asked_params(draft: Any, draft_tokens: int | None, *, model: Any, kind: type, **options: Any) -> SamplingParams:
    """What ``generate`` of a model is asked for.

    Args:
        draft: that which is to guess; None: nothing is.
        draft_tokens: guesses in each round; None: ``DRAFT_TOKENS`` where there is a draft.
        model: the target.
        kind: the class of its drafts.
        options: the others of ``SamplingParams``.
    Raises:
        ValueError: an option that is wrong, or a draft that is none, or another model's.
    """
    if draft is None:
        if draft_tokens is not None:
            raise ValueError(f"draft_tokens={draft_tokens} without a draft. Give draft=model.draft too.")
        return SamplingParams(**options)
    if not isinstance(draft, kind):
        raise ValueError(f"draft={draft!r} is no draft, expected model.draft")
    if draft.target is not model:
        raise ValueError(
            f"the draft is bound to another model or version, this model is at version {model.version}."
            " Use model.draft, or draft.bind(model)."
        )
    return SamplingParams(draft_tokens=DRAFT_TOKENS if draft_tokens is None else draft_tokens, **options)


def check_chosen(token_ids: np.ndarray, whose: str = "the model") -> None:
    """Refuse to go on after logits that are NaN: any token would do, and whoever reads it would not know.

    Args:
        token_ids: integers [B] or [B, T], ``NO_TOKEN`` where none can be chosen.
        whose: logits they were chosen from.
    Raises:
        FloatingPointError: there is one.
    """
    is_none = token_ids == NO_TOKEN
    if is_none.any():
        rows = np.flatnonzero(is_none.reshape(len(is_none), -1).any(axis=1)).tolist()
        raise FloatingPointError(
            f"{whose} gives rows {rows} logits that are NaN or infinite, expected numbers to choose a token by."
            " Is one of its weights infinite or NaN?"
        )


def seed_bits(seed: int) -> int:
    """A seed in the 32 bits that generators on a CPU look at, in torch and JAX; of a longer one a hash."""
    seed = operator.index(seed)
    return seed if seed < 2**32 else int(np.random.SeedSequence(seed).generate_state(1)[0])


def check_room(max_new_tokens: int) -> None:
    """Raises ValueError if it is no number of tokens to make room for."""
    if problems := _whole("max_new_tokens", max_new_tokens, 0, MOST_TOKENS):
        raise ValueError(problems[0])


def _whole(name: str, value: object, least: int, most: float = float("inf")) -> list[str]:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= operator.index(value) <= most:
        return []
    bounds = "" if most == float("inf") else f", at most {most}"
    return [f"{name}={value!r}, expected an integer, at least {least}{bounds}"]


def _number(value: Any) -> float | None:
    """A number of whichever library; None: it is none."""
    try:
        return None if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
