"""Adapters of every kind on both backends, held against PEFT's own models in float32."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from adapters import CASES, FAST, Adapters, error

from parity.model_backend import trace_names
from tests.shape_suffixes import checked_shape_suffixes

BOUND = 2e-5  # relative, of logits and of every hidden state
SIDES = [
    pytest.param(side, case, marks=[] if side == "torch" or case in FAST else pytest.mark.slow)
    for side in ("torch", "jax")
    for case in CASES
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Adapters(tmp_path_factory.mktemp("lora"))


def load(side, path, **options):
    return importlib.import_module(f"{side}_models").load(path, **options)


@pytest.mark.parametrize(("side", "case"), SIDES)
def test_logits_and_hidden_states_are_pefts(made, side, case):
    zoo, _ = CASES[case]
    batch, expected = made.prompt(zoo), made.reference(case)
    model = load(side, made.checkpoint(zoo)).attach_lora(made.adapter(case))
    with checked_shape_suffixes("jax_models", "torch_models"):
        logits, taps = model.with_taps(**batch)
    names = trace_names(model.checkpoint)
    found = {"logits": logits} | {names[path]: tap for path, tap in taps.items() if names.get(path) in expected}
    assert found.keys() == expected.keys()
    errors = {name: error(value, expected[name], batch) for name, value in found.items()}
    assert max(errors.values()) <= BOUND, errors
    plain = load(side, made.checkpoint(zoo))(**batch) if side == "torch" else model(**batch, adapter=[None] * 3)
    assert error(plain, expected["logits"], batch) > 0.1, "the adapter changes too little to be seen"


@pytest.mark.parametrize("side", ["torch", "jax"])
@pytest.mark.parametrize("case", FAST)
def test_each_row_of_a_mixed_batch_is_as_if_it_were_alone_and_a_row_without_is_the_bases(made, side, case):
    zoo, _ = CASES[case]
    batch = made.prompt(zoo)
    base = load(side, made.checkpoint(zoo))
    alone = base(**batch)
    model = base.attach_lora(made.adapter(case), "a").attach_lora(made.adapter(case, seed=1), "b")
    rows = ["a", None, "b"]
    mixed = np.asarray(model(**batch, adapter=rows))
    real = batch["attention_mask"] == 1
    # torch multiplies an expert's rows together, whoever's they are, and how many there are decides how a CPU does it
    most = np.finfo(np.float32).eps if side == "torch" and zoo == "qwen3-moe" else 0

    def is_same(found, expected):
        return np.linalg.norm(found - expected) <= most * np.linalg.norm(expected)

    assert is_same(mixed[1], np.asarray(alone)[1])
    for row, (name, seed) in {0: ("a", 0), 2: ("b", 1)}.items():
        assert is_same(mixed[row], np.asarray(model(**batch, adapter=name))[row])
        expected = made.reference(case, seed)["logits"][row][real[row]]
        found = mixed[row][real[row]]
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) <= BOUND
