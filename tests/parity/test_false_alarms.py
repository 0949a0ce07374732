"""Correct pairs pass: JAX compiled and not, torch and transformers, over seeds, families and dtypes."""

from __future__ import annotations

from itertools import combinations

import pytest
from correct_pairs import BACKENDS, traces_of

from parity.compare import compare

SEEDS = 40


def alarms(traces) -> list[str]:
    """What any pair of correct runs is accused of."""
    found = []
    for one, other in combinations(traces, 2):
        comparison = compare(traces[one][0], traces[other][0], traces[one][1], oracle_b=traces[other][1])
        if comparison.verdict != "PASS":
            found.append(f"{one} against {other}: {comparison.verdict}: {comparison.summary}")
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["qwen3", "qwen3-moe"])
def test_correct_backends_are_not_accused(model, dtype, tmp_path):
    quick = tuple(name for name in BACKENDS if name != "jax eager")
    assert alarms(traces_of(model, tmp_path / "c", seed=0, dtype=dtype, backends=quick, num_hidden_layers=2)) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["qwen3", "qwen3-moe"])
def test_no_correct_pair_is_accused_over_many_seeds(model, dtype, seed, tmp_path):
    assert alarms(traces_of(model, tmp_path / "c", seed=seed, dtype=dtype, num_hidden_layers=2)) == []
