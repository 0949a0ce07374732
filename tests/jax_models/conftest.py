"""Small checkpoints, and models of them."""

from __future__ import annotations

import pytest
from small_checkpoints import Make, maker

import jax_models


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A checkpoint of several files; made once, however often it is asked for."""
    return maker(tmp_path_factory)


@pytest.fixture(scope="module")
def dense(make: Make) -> jax_models.Model:
    return jax_models.load(make())


@pytest.fixture(scope="module")
def tied(make: Make) -> jax_models.Model:
    return jax_models.load(make("qwen3-tied"))
