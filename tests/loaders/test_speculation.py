"""The rules of speculation: what is accepted, and that sampled tokens are the target's; on a small vocabulary."""

import itertools

import numpy as np
import pytest

from loaders.host.acceptance import accept_greedy, accept_sampled, distribution, draw
from loaders.host.speculation import Rows, SpeculationReport

V, K, ROWS = 5, 3, 20_000
LIMIT = {24: 66.0, 4: 24.0}  # chi-square of so many degrees of freedom exceeds this once in 100 000 times


def test_greedy_acceptance_ends_at_the_first_difference_and_the_target_says_what_comes_there():
    drafted = np.array([[1, 2, 3], [1, 2, 4], [0, 2, 3], [1, 0, 3]])
    best = np.array([[1, 2, 3, 9]] * 4)
    count, following = accept_greedy(drafted, best)
    assert count.tolist() == [3, 2, 0, 1]
    assert following.tolist() == [9, 3, 1, 2]


def chains(sharpness):
    """Next-token distributions of target and draft given the last token, [V, V]; not alike, some of it impossible."""
    rng = np.random.default_rng(7)
    p_VV, q_VV = (rng.dirichlet(np.full(V, sharpness), V) for _ in range(2))
    p_VV[:, 1] = 0  # the draft may say what the target never would
    q_VV[:, 3] = 0  # and the other way round
    return (m / m.sum(axis=1, keepdims=True) for m in (p_VV, q_VV))


def pairs(accept, p_VV, q_VV):
    """How often each pair came first, [V, V], of ROWS runs from token 0."""
    rng = np.random.default_rng(11)
    tokens = [[] for _ in range(ROWS)]
    while min(map(len, tokens)) < 2:
        drafted, last = [], np.array([row[-1] if row else 0 for row in tokens])
        for _ in range(K):
            last = draw(q_VV[last], rng)
            drafted.append(last)
        drafted_BK = np.stack(drafted, axis=1)
        before_BT = np.concatenate([[[row[-1] if row else 0] for row in tokens], drafted_BK], axis=1)
        count_B, next_B = accept(drafted_BK, q_VV[before_BT[:, :-1]], p_VV[before_BT], rng)
        for row, count in enumerate(count_B):
            tokens[row] += [*drafted_BK[row, :count], next_B[row]]
    found = np.zeros((V, V))
    np.add.at(found, tuple(np.array([row[:2] for row in tokens]).T), 1)
    return found


def chi_square(found, want):
    possible = want > 0
    assert (found[~possible] == 0).all()
    return float(((found - want)[possible] ** 2 / want[possible]).sum())


def always(drafted_BK, draft_BKV, target_BTV, rng):
    return np.full(len(drafted_BK), K), draw(target_BTV[:, -1], rng)


def without_residual(drafted_BK, draft_BKV, target_BTV, rng):
    count_B, _ = accept_sampled(drafted_BK, draft_BKV, target_BTV, rng)
    return count_B, draw(target_BTV[np.arange(len(count_B)), count_B], rng)


@pytest.mark.parametrize("sharpness", [0.5, 3.0])
def test_sampled_pairs_are_distributed_as_the_targets_whatever_the_draft_is(sharpness):
    p_VV, q_VV = chains(sharpness)
    found, want = pairs(accept_sampled, p_VV, q_VV), ROWS * p_VV[0][:, None] * p_VV
    assert chi_square(found, want) < LIMIT[24]
    assert chi_square(found.sum(axis=1), want.sum(axis=1)) < LIMIT[4]


@pytest.mark.parametrize("wrong", [always, without_residual])
def test_a_wrong_rule_of_acceptance_is_seen(wrong):
    p_VV, q_VV = chains(3.0)
    found, want = pairs(wrong, p_VV, q_VV), ROWS * p_VV[0][:, None] * p_VV
    possible = want > 0
    assert ((found - want)[possible] ** 2 / want[possible]).sum() > 10 * LIMIT[24]


def test_a_draft_that_is_the_target_is_always_accepted():
    p_VV, _ = chains(3.0)
    rng = np.random.default_rng(0)
    drafted = np.array([[0, 2, 4]] * 50)
    q = p_VV[np.array([[3, 0, 2]] * 50)]
    count, _ = accept_sampled(drafted, q, p_VV[np.array([[3, 0, 2, 4]] * 50)], rng)
    assert (count == 3).all()


def test_the_cuts_of_a_distribution_are_those_of_generate():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3]))
    cases = {
        (1.0, 1.0, None): [0.1, 0.4, 0.2, 0.3],
        (1.0, 1.0, 2): [0, 4 / 7, 0, 3 / 7],
        (1.0, 0.4, None): [0, 1, 0, 0],
        (1.0, 0.41, None): [0, 4 / 7, 0, 3 / 7],
        (1.0, 0.5, 3): [0, 4 / 7, 0, 3 / 7],  # of the three that are left, 4/9 is not yet half
        (0.5, 1.0, None): [1 / 30, 16 / 30, 4 / 30, 9 / 30],
        (1.0, 1e-9, None): [0, 1, 0, 0],
        (1.0, 1.0, 99): [0.1, 0.4, 0.2, 0.3],
    }
    for (temperature, top_p, top_k), want in cases.items():
        found = distribution(logits[None], temperature, top_p, top_k)[0]
        np.testing.assert_allclose(found, want, atol=1e-12, err_msg=f"{temperature} {top_p} {top_k}")
    ties = distribution(np.zeros(4), 1.0, 1.0, 2)
    assert ties.tolist() == [0.5, 0.5, 0, 0]  # the lowest ids of equals


def test_draw_never_takes_what_has_no_weight():
    class Ends:
        def __init__(self, value):
            self.value = value

        def random(self, shape):
            return np.full(shape, self.value)

    for value, weights in itertools.product((0.0, 1 - 2**-53), ([0, 0, 1.0, 0], [0, 0.1, 0.2, 0], [0, 1e-300, 0, 0])):
        assert weights[draw(np.array(weights), Ends(value))] > 0


def test_rows_end_at_an_end_token_or_at_the_limit_and_are_filled():
    rows = Rows(3, 4, np.array([7]), -1)
    rows.add(np.array([[1, 7, 2], [1, 2, 5], [7, 5, 5]]), np.array([3, 2, 1]))
    assert rows.is_active_B.tolist() == [False, True, False]
    rows.add(np.array([[9], [3], [9]]))
    assert rows.finished().tolist() == [[1, 7, -1], [1, 2, 3], [7, -1, -1]]
    rows.add(np.array([[4, 5]] * 3))
    assert not rows.is_active_B.any()
    assert rows.finished()[1].tolist() == [1, 2, 3, 4]


def test_acceptance_length_is_tokens_for_a_verification():
    assert SpeculationReport(rounds=4, drafted=12, accepted=6).acceptance_length == 2.5
    assert SpeculationReport(0, 0, 0).acceptance_length == 0
