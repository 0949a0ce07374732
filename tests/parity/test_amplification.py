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


def test_a_token_that_rounding_may_turn_around_says_nothing_of_the_others():
    ours, peer, oracle = one_token_off(1.5)  # as much as all the others together, many times over
    assert compare(ours, peer, amplified(oracle, 31.0)).verdict == "FAIL"  # of 8 u 31 < 1
    comparison = compare(ours, peer, amplified(oracle, 300.0))
    assert comparison.verdict == "PASS"
    assert all(count.first_miss is None for count in comparison.top1)
    others = ours.tensors["logits"].copy()
    others[0, 1:] *= 1.05  # and they are not excused
    off = Trace({**ours.tensors, "logits": others}, ours.meta)
    assert compare(off, peer, amplified(oracle, 300.0)).verdict == "FAIL"


def test_a_top_1_that_rounding_may_turn_is_a_tie():
    ours, peer, oracle = trio()
    wrong = ours.tensors["logits"].copy()
    best = oracle.tensors["logits"][0, 0].argmax()
    wrong[0, 0, best] = wrong[0, 0].min()
    ours = Trace({**ours.tensors, "logits": wrong}, ours.meta)
    (count, _) = compare(ours, peer, oracle).top1
    assert count.first_miss == (0, 0)
    (count, _) = compare(ours, peer, amplified(oracle, 300.0)).top1
    assert count.first_miss is None
    assert count.ties > compare(peer, peer, oracle).top1[0].ties


def test_a_whole_tensor_may_be_off_what_the_oracle_makes_of_rounding_where_its_peer_was_lucky():
    ours, _, oracle = trio()
    peer = Trace({name: array.copy() for name, array in oracle.tensors.items()}, ours.meta)  # without any error
    assert compare(ours, peer, oracle).verdict == "FAIL"
    everywhere = Trace({**oracle.tensors, NAME: np.full((B, T), 4.0, np.float32)}, oracle.meta)
    row = next(row for row in compare(ours, peer, everywhere).rows if row.name == "logits")
    assert row.verdict == "PASS"


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
