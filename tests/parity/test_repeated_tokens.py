"""Rounding is no chance: what repeats a token repeats its errors, which are no evidence of a fault."""

from __future__ import annotations

import numpy as np
import pytest

from loaders import open_checkpoint
from parity.backends import open_backend
from parity.compare import compare
from parity.comparison.case import Case
from parity.comparison.sensitivity import _alike, _judge
from parity.record import record_model
from parity.record_oracle import record_oracle
from parity.zoo import make_checkpoint
from parity.zoo.pictures import pictures


def compared(path, *batches):
    """What comparisons of JAX and torch, both right, on each batch of token ids find."""
    a, b = open_backend("jax"), open_backend("torch")
    models = a.load(path), b.load(path)
    for ids in batches:
        inputs = {"input_ids": ids}
        traces = [record_model(model, backend, inputs) for model, backend in zip(models, (a, b), strict=True)]
        yield compare(*traces, record_oracle(open_checkpoint(path), inputs))


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_correct_pair_on_one_token_again_and_again_is_no_bug(name, tmp_path):
    path = make_checkpoint(name, tmp_path / "it", dtype="BF16")
    row = np.random.default_rng(0).integers(0, 150, (1, 40))
    for found in compared(path, np.ones((1, 64), int), row.repeat(8, 0), np.tile(row[:, :4], (1, 16))):
        assert found.verdict in ("PASS", "INCONCLUSIVE"), found.summary


@pytest.mark.parametrize(("seed", "rows"), [(1, 4), (22, 8)])
def test_rows_that_share_a_prefix_are_no_bug_of_either(seed, rows, tmp_path):
    """Each token attends to the same rounded keys, which moves all of them, in both backends, in one direction."""
    path = make_checkpoint("qwen3", tmp_path / "it", seed=seed, dtype="BF16")
    vocab_size, rng = open_checkpoint(path).config.vocab_size, np.random.default_rng(seed)
    batches = []
    for count in (4, 8):
        prefix = rng.integers(0, vocab_size, 56)
        batches.append(np.stack([np.concatenate([prefix, rng.integers(0, vocab_size, 8)]) for _ in range(count)]))
    (found,) = compared(path, batches[rows == 8])
    assert found.verdict == "PASS", found.summary


@pytest.mark.parametrize(
    ("factors", "judged"),
    [
        ((0.0094, 0.0056), (None, None)),  # as seed 22 has them: one way, and near each other
        ((0.0094, -0.0010), ("bug", "a")),
        ((0.0010, -0.0094), ("peer is the outlier", "b")),
        ((0.0094, 0.0000), ("bug", "a")),
        ((0.0094, 0.0190), ("both wrong", "both")),
        ((0.0094, -0.0094), ("both wrong", "both")),
        ((0.0080, -0.0080), (None, None)),
    ],
)
def test_a_factor_counts_where_it_stands_apart_from_the_peers(factors, judged):
    assert _judge(factors, 0.0014) == judged


def test_placeholders_of_a_picture_are_not_one_token(tmp_path):
    """They share an id and nothing else, so they are evidence, each of its own; a token that is said twice is one."""
    checkpoint = open_checkpoint(make_checkpoint("qwen3_vl", tmp_path / "it", dtype="BF16"))
    inputs = pictures(checkpoint.config)
    oracle = record_oracle(checkpoint, inputs)
    mask, ids, vision = oracle.mask.astype(bool), inputs["input_ids"], checkpoint.config.vision
    is_shown = np.isin(ids, [vision.image_token_id, vision.video_token_id]) & mask
    alike, count = _alike(Case(oracle, oracle, oracle, oracle), mask)
    number = np.full(ids.shape, -1)
    number[mask] = alike
    assert len(np.unique(number[is_shown])) == is_shown.sum() > 20
    said = mask & ~is_shown
    assert len(np.unique(number[said])) <= len(np.unique(ids[said])) < said.sum()  # twins of the zoo are one as well
    assert count == len(np.unique(alike))
