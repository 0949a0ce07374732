"""Small checkpoints, and models of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_checkpoints import Make, maker

import torch_models
from parity.zoo import make_checkpoint


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("pair")
    return [make_checkpoint("qwen3", root / str(seed), seed=seed, num_hidden_layers=2) for seed in range(2)]


@pytest.fixture
def model(pair: list[Path]) -> torch_models.Model:
    return torch_models.load(pair[0])


@pytest.fixture
def fast_pair(tmp_path: Path) -> list[Path]:
    return [make_checkpoint("qwen3-tied", tmp_path / str(seed), seed=seed, num_hidden_layers=1) for seed in range(2)]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A checkpoint of several files; made once, however often it is asked for."""
    return maker(tmp_path_factory)


@pytest.fixture
def dense(make: Make) -> torch_models.Model:
    return torch_models.load(make())


@pytest.fixture
def tied(make: Make) -> torch_models.Model:
    return torch_models.load(make("qwen3-tied"))
