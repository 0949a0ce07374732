"""Drafts that are right where a test says so: the real draft runs, and what it chose is replaced."""

from collections.abc import Callable

import numpy as np

import jax_models
import torch_models
from parity.zoo.draft import make_drafting_checkpoint

TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "pad_token_id": 5}
PACKAGES = {"jax": jax_models, "torch": torch_models}
LENGTHS, T = (16, 9, 4, 12), 16  # a bucket of JAX's: nothing is added on the left
# row 0 is never right, row 1 always, row 2 but for every third token, row 3 as it happens
Wrong = Callable[[int, int], bool]


def wrong(row: int, index: int) -> bool:
    return (True, False, index % 3 == 0, bool(np.random.default_rng([row, index]).integers(2)))[row]


def load(package, directory, name="qwen3_5", dtype=None, **options):
    """A model of two layers with its draft."""
    return package.load(make_drafting_checkpoint(name, directory, **TWO_LAYERS, **options), mtp=True, dtype=dtype)


def batch(side):
    """Rows of LENGTHS tokens; under the padding stands a token that whoever looks at it sees."""
    ids_BT, mask_BT = np.full((len(LENGTHS), T), 7), np.zeros((len(LENGTHS), T), np.int64)
    for row, length in enumerate(LENGTHS):
        place = slice(T - length, T) if side == "left" else slice(0, length)
        ids_BT[row, place], mask_BT[row, place] = np.random.default_rng(row).integers(0, 211, length), 1
    return ids_BT, mask_BT


def chosen(tokens_BN: np.ndarray, wrong: Wrong, positions_B: np.ndarray, vocab_size: int) -> np.ndarray:
    """Logits, [B, V], that say the token after the one at these positions: the right one, or another."""
    logits_BV = np.zeros((len(tokens_BN), vocab_size), np.float32)
    for row, position in enumerate(positions_B):
        index = min(int(position) + 1 - LENGTHS[row], tokens_BN.shape[1] - 1)
        logits_BV[row, (tokens_BN[row, index] + wrong(row, index)) % vocab_size] = 1
    return logits_BV


def plant(monkeypatch, model, tokens_BN, wrong=wrong):
    """Make the model's draft say ``tokens_BN``, the i-th of a row unless ``wrong(row, i)``."""
    at = np.arange(len(tokens_BN))

    def said(array, positions_B):
        return chosen(tokens_BN, wrong, np.asarray(positions_B), array.shape[1])

    if isinstance(model, jax_models.model.Model):
        programs = model.programs.draft
        extend, step = programs.extend, programs.step

        def extend_jax(weights, next_ids_BT, hidden_BTD, positions_BT, last_B, seen, cache):
            found, *rest = extend(weights, next_ids_BT, hidden_BTD, positions_BT, last_B, seen, cache=cache)
            return said(found, positions_BT[at, last_B]), *rest

        def step_jax(weights, ids_B, hidden_B1D, offset, cache):
            positions_B = np.asarray(cache.position) + 1 + int(offset)
            found, *rest = step(weights, ids_B, hidden_B1D, offset, cache=cache)
            return said(found, positions_B), *rest

        monkeypatch.setattr(programs, "extend", extend_jax)
        monkeypatch.setattr(programs, "step", step_jax)
        return
    import torch

    kind = torch_models.draft.Draft
    extend, step = kind.extend, kind.step

    def extend_torch(self, next_ids_BT, hidden_BTD, positions_BT, last_B, cache, seen):
        found, state = extend(self, next_ids_BT, hidden_BTD, positions_BT, last_B, cache, seen)
        return torch.from_numpy(said(found, positions_BT[at, last_B])), state

    def step_torch(self, ids_B, hidden_B1D, offset, cache):
        positions_B = cache.position + 1 + offset
        found, state = step(self, ids_B, hidden_B1D, offset, cache)
        return torch.from_numpy(said(found, positions_B)), state

    monkeypatch.setattr(kind, "extend", extend_torch)
    monkeypatch.setattr(kind, "step", step_torch)


def watch_keep(monkeypatch, model, look):
    """Call ``look(cache, kept_B)`` after every round; what it gives, if anything, replaces a JAX cache."""
    if isinstance(model, jax_models.model.Model):
        programs = model.programs.draft
        keep = programs.keep

        def keep_jax(history, kept_B, tokens, cache):
            cache = keep(history, kept_B, tokens, cache=cache)
            return look(cache, np.asarray(kept_B)) or cache

        monkeypatch.setattr(programs, "keep", keep_jax)
        return
    kind = torch_models.cache.Cache
    keep = kind.keep

    def keep_torch(self, kept_B, tokens):
        keep(self, kept_B, tokens)
        look(self, kept_B.numpy())

    monkeypatch.setattr(kind, "keep", keep_torch)


def expected_report(wrong, tokens_draft, max_new_tokens):
    """By hand, for rows that no token ends: (rounds, accepted)."""
    rounds = accepted = 0
    for row in range(len(LENGTHS)):
        made = 1
        while made < max_new_tokens:
            count = 0
            while count < tokens_draft and not wrong(row, made + count):
                count += 1
            rounds, accepted, made = rounds + 1, accepted + count, made + count + 1
    return rounds, accepted
