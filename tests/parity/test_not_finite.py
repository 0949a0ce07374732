"""Weights that are not finite: the oracle is not either, so nobody is judged; a backend's own NaN is its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_checkpoints import broken_copy

import parity
from parity.cli import main
from parity.zoo import make_checkpoint

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3", tmp_path_factory.mktemp("finite") / "a", num_hidden_layers=2)


def one_nan(tensors: dict[str, np.ndarray]) -> None:
    tensors[NAME] = tensors[NAME].copy()
    tensors[NAME][0, 0] = np.nan


@pytest.mark.parametrize(("verb", "where"), [("run", "hidden_states.1"), ("bisect", NAME.removesuffix(".weight"))])
def test_of_weights_that_are_not_finite_nobody_is_blamed(verb, where, checkpoint, tmp_path, capsys):
    broken = broken_copy(checkpoint, tmp_path / "b", one_nan)
    assert main([verb, str(broken), "--a", "torch", "--b", "torch"]) == 3
    printed = " ".join("".join(capsys.readouterr()).split())
    assert "the oracle is not finite" in printed
    assert where in printed


def test_a_backend_that_makes_nan_of_finite_weights_is_blamed(checkpoint):
    pair = parity.live_pair(checkpoint, "torch", "torch")
    hook = pair.b.model.model.layers["0"].mlp.register_forward_hook(lambda _, given, found: found * np.nan)
    found = parity.bisect(pair.a, pair.b, pair.inputs, checkpoint=pair.checkpoint)
    hook.remove()
    assert (found.culprit.path, found.culprit.blame) == ("model.layers.0.mlp", "b")
