"""How many drafted tokens stay, and which token follows them: the rules of speculative decoding, on the host.

Source: arXiv:2211.17192, algorithm 1. Rows are independent.
"""

from __future__ import annotations

import numpy as np


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
    q_BK, p_BK = (
        np.take_along_axis(part, drafted_BK[..., None], axis=-1)[..., 0] for part in (draft_BKV, target_BTV[:, :K])
    )
    is_taken_BK = rng.random((B, K)) * q_BK < p_BK  # never for p = 0
    count_B = np.cumprod(is_taken_BK, axis=1).sum(axis=1)
    rows_B, is_rejected_B = np.arange(B), count_B < K
    left_BV = target_BTV[rows_B, count_B].astype(np.float64)
    more_BV = np.maximum(left_BV - draft_BKV[rows_B, np.minimum(count_B, K - 1)], 0.0)
    # rounding may leave nothing where p and q are equal; then the token was one of p's in any case
    has_more_B = is_rejected_B & (more_BV.sum(axis=1) > 0)
    return count_B, draw(np.where(has_more_B[:, None], more_BV, left_BV), rng)


def draw(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices into the last axis, each with probability in proportion to its weight; float64 sums."""
    total = np.cumsum(weights, axis=-1, dtype=np.float64)
    wanted = rng.random(total.shape[:-1]) * total[..., -1]
    return (total <= wanted[..., None]).sum(axis=-1).clip(max=total.shape[-1] - 1)


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
