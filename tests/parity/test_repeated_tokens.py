"""Rounding is no chance: what repeats a token repeats its errors, which are no evidence of a fault."""

from __future__ import annotations

import numpy as np
import pytest

from loaders import open_checkpoint
from parity.backends import open_backend
from parity.compare import compare
from parity.record import record_model
from parity.record_oracle import record_oracle
from parity.zoo import make_checkpoint


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
