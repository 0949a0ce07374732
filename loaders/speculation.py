"""What speculative decoding decides on the host: how many drafted tokens stay, and which token follows them.

Source: arXiv:2211.17192, algorithm 1. Rows are independent; both backends and the tests use it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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


def accept_greedy(drafted_BK: np.ndarray, best_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take drafted tokens as long as they are what the target takes.

    Args:
        drafted_BK: integers [B, K], the draft's tokens.
        best_BT: integers [B, K + 1], the target's token after each prefix.
    Returns:
        How many stay, [B], 0..K; and the target's token after them, [B].
    """
    is_same_BK = drafted_BK == best_BT[:, :-1]
    count_B = np.cumprod(is_same_BK, axis=1).sum(axis=1)
    return count_B, best_BT[np.arange(len(best_BT)), count_B]


def accept_sampled(
    drafted_BK: np.ndarray, draft_BKV: np.ndarray, target_BTV: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Take each drafted token with probability min(1, p / q); else draw from what p has more than q.

    So the tokens are distributed as if drawn from the target alone, whatever the draft is.

    Args:
        drafted_BK: integers [B, K], drawn from ``draft_BKV``.
        draft_BKV: the draft's distributions q, [B, K, V].
        target_BTV: the target's distributions p after each prefix, [B, K + 1, V].
        rng: of the draws.
    Returns:
        How many stay, [B], 0..K; and the token after them, [B].
    """
    B, K = drafted_BK.shape
    count_B, next_B = np.zeros(B, np.int64), np.zeros(B, np.int64)
    for row in range(B):
        count = 0
        while count < K:
            token = drafted_BK[row, count]
            q, p = draft_BKV[row, count, token], target_BTV[row, count, token]
            if rng.random() * q >= p:  # never for p = 0: a drawn token has q > 0
                break
            count += 1
        left_V = target_BTV[row, count].astype(np.float64)
        if count < K:
            more_V = np.maximum(left_V - draft_BKV[row, count], 0.0)
            # rounding may leave nothing where p and q are equal; then the token was one of p's in any case
            left_V = more_V if more_V.sum() > 0 else left_V
        count_B[row], next_B[row] = count, draw(left_V, rng)
    return count_B, next_B


def draw(weights_V: np.ndarray, rng: np.random.Generator) -> int:
    """An index with probability in proportion to its weight, float64 sums."""
    total_V = np.cumsum(weights_V, dtype=np.float64)
    return int(np.searchsorted(total_V, rng.random() * total_V[-1], side="right").clip(max=len(total_V) - 1))


def distribution(logits: np.ndarray, temperature: float, top_p: float, top_k: int | None) -> np.ndarray:
    """softmax(logits / temperature) cut to the best ``top_k``, then to ``top_p``; float64, over the last axis.

    ``top_p``: the smallest set of best tokens whose probability reaches it; the best token always stays.
    """
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, axis=-1, kind="stable")
    best = np.take_along_axis(scaled, order, axis=-1)
    if top_k is not None:
        best[..., top_k:] = -np.inf
    best = np.exp(best - best[..., :1])
    best /= best.sum(axis=-1, keepdims=True)
    best[np.cumsum(best, axis=-1) - best >= top_p] = 0.0
    found = np.zeros_like(scaled)
    np.put_along_axis(found, order, best / best.sum(axis=-1, keepdims=True), axis=-1)
    return found


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

    def add(self, row: int, tokens: list[int]) -> None:
        """Append to a row until it ends; what comes after its end is dropped."""
        for token in tokens:
            if not self.is_active_B[row]:
                return
            self._tokens[row].append(token)
            self.is_active_B[row] = token not in self._ends and len(self._tokens[row]) < self._limit

    def finished(self) -> np.ndarray:
        """int64 [B, N]: every row, filled up to the longest."""
        length = max(map(len, self._tokens))
        return np.array([row + [self._filler] * (length - len(row)) for row in self._tokens], np.int64)
