"""The host's side of speculative decoding, of both backends: what is drawn, what stays, what the next round reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from loaders.host.acceptance import accept_greedy, accept_sampled, distribution, draw
from loaders.host.inputs import ModelInputs
from loaders.host.sampling import NO_TOKEN, SamplingParams, check_chosen


@dataclass(frozen=True)
class SpeculationReport:
    """What a draft was worth in one generation."""

    rounds: int  # verifications, over all rows that had not ended
    drafted: int  # tokens the draft proposed in them
    accepted: int  # of those, how many the target took

    @property
    def acceptance_length(self) -> float:
        """Tokens gained by one verification of one row: those accepted, and the target's own."""
        return 1 + self.accepted / self.rounds if self.rounds else 0.0


class Speculation:
    """One speculative generation of B rows, a round after the other.

    A round: the draft reads ``next_ids_BT`` at ``next_positions`` and guesses from its state at ``last_B``; each guess
    but the last is read for the one after it; the target reads ``fed``, of which ``verify`` says what to keep.

    Args:
        prompt: every row's real tokens at its end.
        rows: what becomes of it.
        params: how tokens are chosen, and K, guesses in each round.
        best: the best token of logits [..., V] wherever they lie, integers [...]; ``NO_TOKEN`` where it is NaN.
        on_host: logits as NumPy's, floats [..., V].

    Attributes:
        next_ids_BT: int32, the token after each of the slots that the target read last; T is K + 1 after the prompt.
        next_positions: int32, theirs: [B, T], or [3, B, T] of a prompt that shows something.
        last_B: int32, the last of those that stayed.
    """

    def __init__(
        self,
        prompt: ModelInputs,
        rows: Rows,
        params: SamplingParams,
        *,
        best: Callable[[Any], np.ndarray],
        on_host: Callable[[Any], np.ndarray],
    ) -> None:
        B, length = prompt.input_ids.shape
        self.rows, self.best = rows, best
        self._prompt, self._params, self._rng = prompt, params, np.random.default_rng(params.seed)
        self._on_host = on_host
        self._rounds, self._drafted, self._accepted = 0, 0, 0
        self._guesses: list[np.ndarray] = []  # of this round, and what each was drawn from
        self._drawn_from: list[np.ndarray] = []
        self.next_positions = positions_ahead(prompt)
        self.last_B, self._position_B = np.full(B, length - 1, np.int32), positions_beyond(prompt)

    def begin(self, logits_BV: Any) -> None:
        """Choose the token after the prompt."""
        self._token_B, _ = self._chosen(logits_BV, "the model")
        self.rows.add(self._token_B[:, None])
        self.next_ids_BT = np.concatenate([self._prompt.input_ids[:, 1:], self._token_B[:, None]], axis=1)

    def guess(self, logits_BV: Any) -> np.ndarray:
        """Choose the next guess, of the draft's logits; int32 [B]."""
        guess_B, found_BV = self._chosen(logits_BV, "the draft")
        self._guesses.append(guess_B)
        if found_BV is not None:
            self._drawn_from.append(found_BV)
        return guess_B

    @property
    def drafted(self) -> np.ndarray:
        """This round's guesses, int32 [B, K]."""
        return np.stack(self._guesses, axis=1)

    @property
    def fed(self) -> np.ndarray:
        """What the target reads to verify them: its own last token, and the guesses; int32 [B, K + 1]."""
        return np.concatenate([self._token_B[:, None], self.drafted], axis=1)

    def verify(self, logits_BTV: Any) -> np.ndarray:
        """Of the target's logits after each token of ``fed``, how many of these stay, int32 [B]; the round ends."""
        drafted_BK, was_active_B = self.drafted, self.rows.is_active_B.copy()
        count_B, token_B = (array.astype(np.int32) for array in self.accepted(logits_BTV))
        self._rounds += int(was_active_B.sum())
        self._drafted += int(was_active_B.sum()) * drafted_BK.shape[1]
        self._accepted += int(count_B[was_active_B].sum())
        steps_T = np.arange(drafted_BK.shape[1] + 1)
        self.next_ids_BT = np.where(steps_T < count_B[:, None], np.pad(drafted_BK, ((0, 0), (0, 1))), token_B[:, None])
        self.rows.add(self.next_ids_BT, count_B + 1)
        kept_B = np.where(self.rows.is_active_B, count_B + 1, 0).astype(np.int32)  # what has ended needs no more room
        self.next_positions = (self._position_B[:, None] + steps_T + 1).astype(np.int32)
        self.last_B, self._position_B, self._token_B = count_B, self._position_B + kept_B, token_B
        self._guesses, self._drawn_from = [], []
        return kept_B

    def accepted(self, logits_BTV: Any) -> tuple[np.ndarray, np.ndarray]:
        """How many guesses stay, integers [B], and the target's token after them, [B]."""
        if self._params.is_greedy:
            return accept_greedy(self.drafted, self._best(logits_BTV, "the model"))
        drawn_from_BKV = np.stack(self._drawn_from, axis=1)
        return accept_sampled(self.drafted, drawn_from_BKV, self._probabilities(logits_BTV, "the model"), self._rng)

    @property
    def report(self) -> SpeculationReport:
        """What the draft was worth so far."""
        return SpeculationReport(self._rounds, self._drafted, self._accepted)

    def _chosen(self, logits_BV: Any, whose: str) -> tuple[np.ndarray, np.ndarray | None]:
        """A token a row, int32 [B], and the distribution it was drawn from; None: it is the best."""
        if self._params.is_greedy:
            return self._best(logits_BV, whose).astype(np.int32), None
        found_BV = self._probabilities(logits_BV, whose)
        return draw(found_BV, self._rng).astype(np.int32), found_BV

    def _best(self, logits: Any, whose: str) -> np.ndarray:
        found = self.best(logits)
        check_chosen(found, whose)
        return found

    def _probabilities(self, logits: Any, whose: str) -> np.ndarray:
        params, host = self._params, self._on_host(logits)
        check_chosen(np.where(np.isfinite(host.max(axis=-1)), 0, NO_TOKEN), whose)
        return distribution(host, params.temperature, params.nucleus, params.top_k)


class Rows:
    """The tokens of a batch while it is generated, and which rows have ended.

    Args:
        num_rows: B.
        max_new_tokens: at most so many per row.
        ends: tokens that end a row.
        filler: what stands in a row after its end.
    """

    def __init__(self, num_rows: int, max_new_tokens: int, ends: np.ndarray, filler: int) -> None:
        self._tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self._limit, self._ends, self._filler = max_new_tokens, {int(end) for end in ends}, filler
        self.is_active_B = np.ones(num_rows, bool)

    def add(self, tokens_BT: np.ndarray, count_B: np.ndarray | None = None) -> None:
        """Append tokens to each row until it ends: the first ``count_B`` of them, or all. The rest is dropped."""
        counts = [tokens_BT.shape[1]] * len(tokens_BT) if count_B is None else count_B.tolist()
        for row, (tokens, count) in enumerate(zip(tokens_BT.tolist(), counts, strict=True)):
            for token in tokens[:count]:
                if self.is_active_B[row]:
                    self._tokens[row].append(token)
                    self.is_active_B[row] = token not in self._ends and len(self._tokens[row]) < self._limit

    def finished(self) -> np.ndarray:
        """int64 [B, N]: every row, filled up to the longest."""
        length = max(map(len, self._tokens))
        return np.array([row + [self._filler] * (length - len(row)) for row in self._tokens], np.int64)


def positions_ahead(prompt: ModelInputs) -> np.ndarray:
    """Position of the token after each, int32 as the prompt's own: the last one's is where the row goes on.

    Args:
        prompt: every row's real tokens at its end.
    """
    next_B = positions_beyond(prompt)
    next_1 = np.broadcast_to(next_B[:, None], (*prompt.position_ids.shape[:-1], 1))
    return np.concatenate([prompt.position_ids[..., 1:], next_1], axis=-1)


def positions_beyond(prompt: ModelInputs) -> np.ndarray:
    """Where each row goes on, int32 [B]: at the number of its tokens, or off it where something is shown."""
    count_B = prompt.attention_mask.sum(1, dtype=np.int32)
    return count_B if prompt.vision is None else count_B + prompt.vision.delta_B
