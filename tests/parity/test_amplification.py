"""How much a checkpoint amplifies rounding: measured by the oracle, checked in traces, used by the verdict."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic_traces import B, T, trio

from loaders import open_checkpoint
from parity.compare import compare
from parity.record_oracle import record_oracle
from parity.trace import Trace
from parity.trace_layout import activations, find_problems
from parity.zoo import make_checkpoint, prompts

NAME = "amplification.logits"


@pytest.mark.parametrize("model", ["qwen3", "qwen3_5"])
def test_the_oracle_measures_it_for_every_tensor(model, tmp_path):
    checkpoint = open_checkpoint(make_checkpoint(model, tmp_path / "checkpoint"))
    trace = record_oracle(checkpoint, prompts(checkpoint.config, rows=2), mtp=model == "qwen3_5")
    assert find_problems(trace.tensors, trace.meta) == []
    real = trace.mask
    for name in activations(trace.tensors):
        found = trace.tensors[f"amplification.{name}"]
        assert found.shape == trace.tensors[name].shape[:2]
        if name == "hidden_states.0":
            assert (found == 0).all()  # nothing comes before it
        elif not name.startswith("mtp."):
            assert 0.3 < np.median(found[real]) < 30, name  # a layer hands an error on, it does not drown in it
    if model == "qwen3_5":  # where a norm follows what nearly cancels, some tokens amplify far more than most
        last = trace.tensors["amplification.logits"][real]
        assert last.max() > 3 * np.median(last)


def one_token_off(times: float) -> tuple[Trace, Trace, Trace]:
    ours, peer, oracle = trio()
    reference = oracle.tensors["logits"][0, 0]
    ours.tensors["logits"] = ours.tensors["logits"].copy()
    ours.tensors["logits"][0, 0] = (1 + times) * reference
    return ours, peer, oracle


def amplified(oracle: Trace, value: float) -> Trace:
    array = np.ones((B, T), np.float32)
    array[0, 0] = value
    return Trace({**oracle.tensors, NAME: array}, oracle.meta)


def test_a_token_may_be_as_much_further_off_as_rounding_moves_it_and_no_more():
    ours, peer, oracle = one_token_off(0.15)
    assert compare(ours, peer, oracle).verdict == "FAIL"
    assert compare(ours, peer, amplified(oracle, 1.0)).verdict == "FAIL"
    assert compare(ours, peer, amplified(oracle, 1e3)).verdict == "PASS"
    ours, peer, oracle = one_token_off(2.5)  # larger than itself: no rounding does that
    peer.tensors["logits"] = ours.tensors["logits"]
    assert compare(ours, peer, amplified(oracle, 1e6)).verdict == "FAIL"


def test_a_whole_tensor_that_is_wrong_fails_however_much_is_amplified():
    ours, peer, oracle = trio()
    for trace in (ours, peer):  # alike, so that only the lid can tell
        trace.tensors["logits"] = np.roll(trace.tensors["logits"], 1, axis=-1)
    everywhere = Trace({**oracle.tensors, NAME: np.full((B, T), 1e6, np.float32)}, oracle.meta)
    assert compare(ours, peer, everywhere).verdict == "FAIL"


@pytest.mark.parametrize(
    "wrong",
    [
        np.full((B, T), np.nan, np.float32),
        np.full((B, T), np.inf, np.float32),
        -np.ones((B, T), np.float32),
        np.ones((B, T - 1), np.float32),
        np.ones((B, T), np.int64),
    ],
    ids=["nan", "inf", "negative", "shape", "integers"],
)
def test_an_amplification_that_would_widen_limits_without_end_is_refused(wrong):
    ours, peer, oracle = trio()
    bad = Trace({**oracle.tensors, NAME: wrong}, oracle.meta)
    with pytest.raises(ValueError, match=r"amplification\.logits"):
        compare(ours, peer, bad)
