"""Rounding is no chance: what repeats a token repeats its errors, which are no evidence of a fault."""

from __future__ import annotations

import numpy as np
import pytest

from loaders import open_checkpoint
from parity.backends import open_backend
from parity.compare import compare
from parity.comparison.case import Case
from parity.comparison.sensitivity import _alike
from parity.record import record_model
from parity.record_oracle import record_oracle
from parity.zoo import make_checkpoint
from parity.zoo.pictures import pictures


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_a_correct_pair_on_one_token_again_and_again_is_no_bug(name, tmp_path):
    path = make_checkpoint(name, tmp_path / "it", dtype="BF16")
    row = np.random.default_rng(0).integers(0, 150, (1, 40))
    a, b = open_backend("jax"), open_backend("torch")
    models = a.load(path), b.load(path)
    for ids in (np.ones((1, 64), int), row.repeat(8, 0), np.tile(row[:, :4], (1, 16))):
        inputs = {"input_ids": ids}
        found = compare(
            record_model(models[0], a, inputs),
            record_model(models[1], b, inputs),
            record_oracle(open_checkpoint(path), inputs),
        )
        assert found.verdict in ("PASS", "INCONCLUSIVE"), found.summary


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
