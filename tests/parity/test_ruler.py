import math

import numpy as np
import pytest

from parity import ruler
from parity.ruler import LIMITS, Judgement, judge

BF16 = LIMITS["bfloat16"]
LID = BF16.lid(4)


def held(e_a: float, e_b: float) -> Judgement:
    return judge(e_a, e_b, k=BF16.k, lid=LID, floor_a=BF16.u, floor_b=BF16.u)


def test_the_constants_are_the_calibrated_ones_and_each_has_a_reason():
    assert (BF16.k, BF16.k_token, BF16.c, BF16.u) == (2, 8, 8, 2**-8)
    fp32 = LIMITS["float32"]
    assert (fp32.k, fp32.k_token, fp32.c, fp32.u) == (4, 12, 40, 2**-24)
    assert {
        *BF16.__slots__,
        "amplification",
        "ANGLES",
        "TOKEN_LID",
        "MIN_REMAINING",
        "ROUTER_SHARE",
        "ROUTER_TOKENS",
        "STEP",
        "FACTOR",
        "FACTOR_DEVIATIONS",
        "FACTOR_TOKENS",
        "FACTOR_DIFFERENT",
        "SEEN_DEVIATIONS",
    } == set(ruler.REASONS)


def test_the_lid_grows_with_the_root_of_the_depth_and_no_depth_counts_as_one_layer():
    assert BF16.lid(1) == 8 * 2**-8
    assert BF16.lid(36) == 6 * BF16.lid(1)
    assert BF16.lid(0) == BF16.lid(1)
    assert BF16.token_lid(4) == 4 * BF16.lid(4)


def test_a_model_that_amplifies_rounding_is_allowed_as_much_more():
    assert BF16.lid(4, amplification=10) == 5 * BF16.lid(4)
    assert BF16.lid(4, amplification=1.5) == BF16.lid(4)
    assert BF16.token_lid(4, amplification=10) == 5 * BF16.token_lid(4)
    assert BF16.lid(4, amplification=1e6) == 0.5  # a tensor half wrong is wrong, however much is amplified
    assert BF16.token_lid(4, amplification=1e6) == 2.0
    assert BF16.layer == BF16.u
    ours, peer = np.array([0.3, 0.03]), np.array([0.001, 0.03])  # lucky at the first token, where rounding decides
    options = {"k": BF16.k_token, "lid": 10.0, "u": BF16.u}
    assert ruler.used_by_token(ours, peer, **options)[0] > 1
    assert ruler.used_by_token(ours, peer, **options, least=BF16.layer * np.array([100.0, 2.0]))[0] < 1


def test_errors_within_twice_each_other_pass_and_the_limit_itself_passes():
    assert held(0.02, 0.01).cause is None
    assert held(0.01, 0.02).cause is None
    assert held(0.02, 0.01).used == 1.0


def test_an_error_over_the_ruler_and_under_the_lid_is_rounding_of_ours():
    assert held(0.021, 0.01) == Judgement(0.02, pytest.approx(1.05), "rounding", "a")


def test_an_error_over_the_ruler_and_the_lid_is_a_bug_of_ours():
    assert (held(0.5, 0.01).cause, held(0.5, 0.01).blame) == ("bug", "a")


def test_a_bad_peer_is_the_outlier_and_never_our_pass():
    assert (held(0.01, 0.021).cause, held(0.01, 0.021).blame) == ("peer is the outlier", "b")
    assert (held(0.01, 0.5).cause, held(0.01, 0.5).blame) == ("peer is the outlier", "b")


def test_two_equally_wrong_backends_hit_the_lid():
    assert (held(0.3, 0.3).cause, held(0.3, 0.3).blame) == ("both wrong", "both")
    assert held(LID * 1.01, LID * 0.99).cause == "both wrong"  # one just over, the other as far off


def test_errors_below_one_rounding_are_held_against_one_rounding():
    assert held(1.9 * BF16.u, 0.0).cause is None
    assert held(2.1 * BF16.u, 0.0).cause == "rounding"
    assert held(0.0, 0.0).used == 0.0


def test_an_infinite_error_fails_whoever_has_it():
    assert held(math.inf, 0.01).cause == "bug"
    assert held(0.01, math.inf).cause == "peer is the outlier"
    assert held(math.inf, math.inf).cause == "both wrong"


def test_without_an_oracle_the_distance_may_be_two_lids_and_nobody_is_blamed():
    assert ruler.judge_direct(2 * LID, lid=LID).cause is None
    assert ruler.judge_direct(2.01 * LID, lid=LID) == Judgement(2 * LID, pytest.approx(1.005), "bug", None)


def test_a_token_is_not_failed_because_the_peer_was_lucky_there():
    peer = np.full(9, 0.02)
    peer[3] = 1e-6  # lucky: without the floor the limit here would be one rounding
    used = ruler.used_by_token(np.full(9, 0.03), peer, k=4, lid=1.0, u=BF16.u)
    np.testing.assert_allclose(used, 0.03 / (4 * 0.02))


def test_the_token_floor_is_the_median_and_at_least_one_rounding():
    assert ruler.token_floor(np.array([0.1, 0.2, 0.9]), BF16.u) == 0.2
    assert ruler.token_floor(np.array([1e-9]), BF16.u) == BF16.u
    assert ruler.token_floor(np.zeros(0), BF16.u) == BF16.u


def test_no_error_over_no_reference_is_no_error_and_any_error_over_none_is_infinite():
    assert ruler.relative(0.0, 0.0) == 0.0
    assert ruler.relative(1.0, 0.0) == math.inf
    np.testing.assert_array_equal(ruler.relative_by_token(np.zeros(2), np.zeros(2)), [0, 0])
    np.testing.assert_array_equal(ruler.relative_by_token(np.array([1.0, 0.0]), np.zeros(2)), [np.inf, 0])


def test_a_token_whose_reference_is_zero_is_held_against_the_mean_token():
    np.testing.assert_allclose(ruler.relative_by_token(np.array([1.0, 1.0]), np.array([0.0, 8.0])), [0.5, 8**-0.5])


def test_the_ratio_never_divides_by_zero():
    assert ruler.ratio(0.0, 0.0, BF16.u) == 0.0
    assert ruler.ratio(math.inf, math.inf, BF16.u) == math.inf
    assert ruler.ratio(4 * BF16.u, 0.0, BF16.u) == 4.0
