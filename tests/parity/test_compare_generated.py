"""Generated tokens under the ruler: which difference is a tie, which is a bug, and whose."""

import numpy as np
import pytest
from synthetic_traces import B, T, V, mask_out, trio

from parity import compare


def decided(a, b, oracle, margin: float) -> None:
    """Give token (1, 4) two leading logits that are ``margin`` apart in the oracle, and exchange them in ours."""
    for trace in (a, b, oracle):
        logits = trace.tensors["logits"]
        logits[1, 4, 7] = logits[1, 4].max() + 2
        logits[1, 4, 8] = logits[1, 4, 7] - margin
    a.tensors["logits"][1, 4, [7, 8]] = a.tensors["logits"][1, 4, [8, 7]]


def test_another_top_1_where_the_reference_is_in_no_doubt_is_a_bug_although_every_tensor_passes():
    a, b, oracle = trio(shape=(3, 200))
    decided(a, b, oracle, margin=0.45)
    comparison = compare(a, b, oracle)
    assert all(row.verdict == "PASS" for row in comparison.rows)
    assert (comparison.verdict, comparison.cause, comparison.whose) == ("FAIL", "bug", "a")
    assert comparison.top1[0].first_miss == (1, 4)
    assert comparison.top1[0].agree == comparison.top1[0].decidable - 1
    assert "row 1, position 4" in comparison.summary


def test_another_top_1_where_rounding_decides_is_a_tie_and_counted():
    a, b, oracle = trio()
    decided(a, b, oracle, margin=0.05)
    comparison = compare(a, b, oracle)
    assert comparison.verdict == "PASS"
    count = comparison.top1[0]
    assert count.first_miss is None
    assert count.decidable + count.ties == count.tokens == B * T
    assert count.decidable == count.agree > 0
    assert count.ties_agree < count.ties


def test_the_bound_of_both_sides_is_the_error_of_the_better_one():
    a, b, oracle = trio()
    comparison = compare(a, b, oracle)
    errors = [np.abs(trace.tensors["logits"] - oracle.tensors["logits"]).max() for trace in (a, b)]
    np.testing.assert_allclose([count.bound for count in comparison.top1], [min(errors)] * 2)


@pytest.mark.parametrize("guilty", [0, 1])
def test_an_innocent_side_is_not_judged_with_the_errors_of_a_guilty_one(guilty):
    a, b, oracle = trio()
    bad = (a, b)[guilty]
    bad.tensors["logits"] = np.roll(bad.tensors["logits"], 1, axis=1)  # far off, at every token
    counts = compare(a, b, oracle).top1
    innocent = counts[1 - guilty]
    assert innocent.agree == innocent.decidable > B * T / 2
    assert counts[guilty].decidable == innocent.decidable
    assert counts[guilty].agree < innocent.agree / 2


def test_equal_generated_tokens_pass_and_are_counted():
    a, b, oracle = generating()
    found = compare(a, b, oracle).generated
    assert (found.outcome, found.first, found.counts) == ("equal", None, {"equal": B})


def generating():
    a, b, oracle = trio()
    ids = np.random.default_rng(5).integers(0, V, (B, 6))
    for trace in (a, b):
        trace.tensors["generated_ids"] = ids.copy()
    return a, b, oracle


def asked_for(trace, count, *, goes_on=False):
    trace.meta |= {"max_new_tokens": count, "ignore_eos": goes_on}
    trace.tensors["generated_ids"] = trace.tensors["generated_ids"][:, :count]


@pytest.mark.parametrize("counts", [(6, 3), (1, 6)])
def test_of_different_numbers_of_generated_tokens_those_that_both_have_are_compared(counts):
    a, b, oracle = generating()
    for trace, count in zip((a, b), counts, strict=True):
        asked_for(trace, count)
    comparison = compare(a, b, oracle)
    assert (comparison.verdict, comparison.generated.steps) == ("PASS", min(counts))
    assert f"the first {min(counts)} are compared" in str(comparison.notes)
    for trace in (a, b, oracle):
        trace.tensors["logits"][1, -1, 3] = 30.0
    a.tensors["generated_ids"][1, 0] += 1
    assert compare(a, b, oracle).verdict == "FAIL"
    b.tensors["generated_ids"] = b.tensors["generated_ids"][:, :0]  # all rows of it ended at once
    assert compare(a, b, oracle).verdict == "FAIL"


def test_generated_tokens_that_cannot_be_compared_are_not_and_that_is_said():
    a, b, oracle = generating()
    asked_for(a, 6, goes_on=True)
    asked_for(b, 4)
    comparison = compare(a, b, oracle)
    assert (comparison.verdict, comparison.generated) == ("PASS", None)
    assert "only one trace goes on after an end of sequence" in str(comparison.notes)
    del b.tensors["generated_ids"]
    comparison = compare(a, b, oracle)
    assert (comparison.verdict, comparison.generated) == ("PASS", None)
    assert "only the first trace has generated tokens" in str(comparison.notes)


def test_a_first_generated_token_that_differs_in_no_doubt_fails():
    a, b, oracle = generating()
    for trace in (a, b, oracle):
        trace.tensors["logits"][1, -1, 3] = 30.0
    a.tensors["generated_ids"][1, 0] += 1
    comparison = compare(a, b, oracle)
    assert (comparison.verdict, comparison.cause) == ("FAIL", "bug")
    assert comparison.generated.first == (1, 0)
    assert "row 1, step 0" in comparison.summary


def test_a_first_generated_token_that_differs_at_a_tie_is_reported_as_a_tie():
    a, b, oracle = generating()
    mask_out((a, b, oracle), 1, slice(-4, None))  # right padding: the step follows the last real token
    oracle.tensors["logits"][1, -5, :2] = [30.0, 30.01]
    for trace in (a, b):
        trace.tensors["logits"][1, -5] = oracle.tensors["logits"][1, -5]
    a.tensors["generated_ids"][1, 0] += 1
    comparison = compare(a, b, oracle)
    assert (comparison.verdict, comparison.cause) == ("PASS", "tie")
    assert comparison.generated.counts == {"equal": B - 1, "tie": 1}


def test_a_later_difference_is_judged_by_a_recorded_margin_and_else_left_open():
    a, b, oracle = generating()
    b.tensors["generated_ids"][2, 3] += 1
    comparison = compare(a, b, oracle)
    assert (comparison.verdict, comparison.exit_code) == ("INCONCLUSIVE", 4)
    assert "row 2, step 3" in comparison.summary
    margins = np.full((B, 6), 9.0, np.float32)
    for trace in (a, b):
        trace.tensors["generated_margins"] = margins
    assert compare(a, b, oracle).verdict == "FAIL"
    margins[2, 3] = 1e-3
    assert (compare(a, b, oracle).verdict, compare(a, b, oracle).cause) == ("PASS", "tie")


def test_the_side_that_leaves_the_oracles_own_tokens_is_to_blame():
    a, b, oracle = generating()
    oracle.tensors["generated_ids"] = a.tensors["generated_ids"].copy()
    oracle.tensors["generated_margins"] = np.full((B, 6), 9.0)
    b.tensors["generated_ids"][0, 2] += 1
    comparison = compare(a, b, oracle)
    assert (comparison.cause, comparison.whose) == ("peer is the outlier", "b")


def test_a_row_that_stops_early_differs_where_it_stops():
    a, b, oracle = generating()
    b.tensors["generated_ids"] = b.tensors["generated_ids"][:, :4]
    assert compare(a, b, oracle).generated.first == (0, 4)
