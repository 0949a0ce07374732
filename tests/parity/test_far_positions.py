"""Angles are float32's in every backend: an error of its own far from the start, which the ruler has to know."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from loaders import Checkpoint, open_checkpoint
from parity.backend import record_backend
from parity.backends import open_backend
from parity.bisect import bisect
from parity.compare import compare
from parity.comparison.outcome import Comparison
from parity.model_backend import ModelBackend
from parity.record_oracle import record_oracle
from parity.ruler import LIMITS
from parity.trace_layout import ANGLE_ERROR, activations, find_problems
from parity.zoo import prompts

FAMILIES = ("qwen3", "qwen3_5", "gemma3")
FAR = 100_000


@pytest.fixture
def far(tiny_model):
    """A checkpoint, and rows of it that begin at 0 and at ``FAR``."""

    def made(family: str) -> tuple[Checkpoint, dict[str, np.ndarray], dict[str, np.ndarray]]:
        checkpoint = open_checkpoint(tiny_model(family))
        inputs = prompts(checkpoint.config, rows=2)
        rows, length = inputs["input_ids"].shape
        counted = np.tile(np.arange(length), (rows, 1))
        return checkpoint, inputs | {"position_ids": counted}, inputs | {"position_ids": counted + FAR}

    return made


def backend(checkpoint: Checkpoint, name: str) -> ModelBackend:
    framework = open_backend(name)
    return ModelBackend(framework.load(checkpoint.source), framework)


def compared(checkpoint: Checkpoint, given: Mapping[str, np.ndarray], *seen: Mapping[str, np.ndarray]) -> Comparison:
    """Both backends of what each of them was ``seen`` to be given, under the oracle of what was ``given``."""
    a, b = (
        record_backend(backend(checkpoint, name), inputs)
        for name, inputs in zip(("jax", "torch"), seen or (given, given), strict=True)
    )
    for trace in (a, b):  # a bug in how positions are made, not other inputs
        trace.meta["input_hash"] = record_backend(backend(checkpoint, "torch"), given).meta["input_hash"]
    return compare(a, b, record_oracle(checkpoint, given, like=b, probes=0))


@pytest.mark.parametrize("family", FAMILIES)
def test_correct_backends_pass_and_no_step_of_theirs_is_named(far, family):
    checkpoint, _, inputs = far(family)
    comparison = compared(checkpoint, inputs)
    assert comparison.verdict == "PASS", comparison.summary
    assert all(row.margin > 0.5 and row.token_margin > 0.5 for row in comparison.rows)
    sides = backend(checkpoint, "jax"), backend(checkpoint, "torch")
    found = bisect(*sides, inputs, checkpoint=checkpoint, layer=1, crossed=False)
    assert not [step for _, table in found.tables for step in table if step.blame]


def test_positions_that_are_wrong_there_are_still_a_bug(far):
    checkpoint, _, inputs = far("qwen3")
    late = inputs["position_ids"].copy()
    late[:, late.shape[1] // 2 :] += 1
    wrong = inputs | {"position_ids": late}
    one, both = compared(checkpoint, inputs, wrong, inputs), compared(checkpoint, inputs, wrong, wrong)
    assert (one.verdict, one.cause, one.whose) == ("FAIL", "bug", "a"), one.summary
    assert (both.verdict, both.cause, both.whose) == ("FAIL", "both wrong", "both"), both.summary


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_measures_it_and_near_the_start_it_is_nothing(far, family):
    checkpoint, near, inputs = far(family)
    traces = record_oracle(checkpoint, near, probes=0), record_oracle(checkpoint, inputs, probes=0)
    real = traces[0].mask
    for trace in traces:
        assert find_problems(trace.tensors, trace.meta) == []
    for name in activations(traces[0].tensors):
        of_near, of_far = (np.median(trace.tensors[ANGLE_ERROR + name][real]) for trace in traces)
        limits = LIMITS["float32"]
        assert 4 * of_near < limits.lid(1), name  # no wider than it would be
        if name == "logits":
            assert of_far > 100 * of_near


def test_what_it_allows_is_the_same_in_every_dtype():
    off = np.array([0.001])
    for limits in LIMITS.values():
        assert limits.lid(0, float(limits.amplification_of(off)[0])) == pytest.approx(max(limits.lid(0), 0.004))
