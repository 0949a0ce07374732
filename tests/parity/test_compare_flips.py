"""Routers that choose other experts, under the ruler: what a flip excuses, and what it does not."""

import numpy as np
from synthetic_traces import B, T, X, add_error, make_oracle, mask_out, trio

from parity import compare


def flip(trace, layer: int, row: int, position: int) -> None:
    """Swap one chosen expert for one that was not."""
    experts = trace.tensors[f"routing.{layer}"] = trace.tensors[f"routing.{layer}"].copy()
    experts[row, position, 0] = next(e for e in range(99) if e not in experts[row, position])


def test_a_nan_behind_a_router_flip_still_fails():
    a, b, oracle = trio(sparse=(1, 3))
    flip(a, 1, 0, 5)
    a.tensors["logits"][0, 9, 0] = np.nan
    comparison = compare(a, b, oracle)
    assert (comparison.verdict, comparison.cause) == ("FAIL", "bug")
    assert "row 0, position 9" in comparison.summary


def test_tokens_from_a_flip_on_are_excluded_in_that_row_from_that_layer_on():
    a, b, oracle = trio(sparse=(2, 4))
    flip(a, 2, 1, 12)
    for name in ("hidden_states.2", "hidden_states.3", "hidden_states.4", "final_hidden_state", "logits"):
        a.tensors[name][1, 12:] += 5.0  # what a flip does to the row from there on
    comparison = compare(a, b, oracle)
    assert comparison.verdict == "PASS"
    tokens = {row.name: row.tokens for row in comparison.rows}
    assert tokens["hidden_states.1"] == B * T
    assert {tokens[f"hidden_states.{i}"] for i in (2, 3, 4)} == {tokens["logits"]} == {B * T - (T - 12)}
    routing = comparison.routing
    assert (routing.flips_a, routing.flips_b, routing.between) == (1, 0, 1)
    assert (routing.excluded, routing.first) == (T - 12, (2, 1, 12))
    assert any("router flip" in note for note in comparison.notes)
    assert np.isnan(comparison.token_used["logits"][1, 12:]).all()


def test_an_error_before_a_flip_is_not_excused_by_it():
    a, b, oracle = trio(sparse=(2,))
    flip(a, 2, 1, 12)
    a.tensors["hidden_states.1"][1, 12:] += 5.0
    a.tensors["hidden_states.3"][1, :12] += 5.0
    comparison = compare(a, b, oracle)
    assert {row.name for row in comparison.rows if row.verdict == "FAIL"} == {"hidden_states.1", "hidden_states.3"}


def test_the_order_of_the_chosen_experts_is_no_flip_and_padding_flips_nothing():
    a, b, oracle = trio(sparse=(2,))
    mask_out((a, b, oracle), 0, slice(0, 5))
    a.tensors["routing.2"] = a.tensors["routing.2"][..., ::-1]
    flip(b, 2, 0, 3)
    assert compare(a, b, oracle).routing.between == 0


def test_with_each_backends_own_routing_replayed_nothing_is_excluded():
    a, b, oracle = trio(sparse=(2,))
    flip(a, 2, 1, 12)
    oracle_a = make_oracle(sparse=(2,))
    oracle_a.tensors["routing.2"] = a.tensors["routing.2"]
    for name in ("hidden_states.3", "logits"):  # the flip makes another stream, in the oracle that replays it as well
        a.tensors[name][1, 12:] += 5.0
        oracle_a.tensors[name][1, 12:] += 5.0
    comparison = compare(a, b, oracle_a, oracle_b=oracle)
    assert comparison.verdict == "PASS"
    assert {row.tokens for row in comparison.rows} == {B * T}
    assert (comparison.routing.flips_a, comparison.routing.flips_b, comparison.routing.between) == (0, 0, 1)


def test_too_few_tokens_left_by_flips_is_inconclusive():
    a, b, oracle = trio(sparse=(2,))
    for row in range(B):
        flip(b, 2, row, 2)
    comparison = compare(a, b, oracle)
    assert (comparison.verdict, comparison.cause, comparison.exit_code) == ("INCONCLUSIVE", "router flip", 4)
    assert f"{2 * B} of {B * T} tokens" in comparison.summary
    assert compare(a, b).verdict == "INCONCLUSIVE"  # without an oracle the two are held against each other


def test_a_failure_before_the_flips_outranks_that_few_tokens_are_left():
    a, b, oracle = trio(sparse=(2,))
    for row in range(B):
        flip(b, 2, row, 2)
    add_error(a, oracle, from_layer=1, times=30)
    assert compare(a, b, oracle).verdict == "FAIL"


def test_a_router_that_is_wrong_and_not_undecided_fails_even_when_its_routing_is_replayed():
    a, b, oracle = trio(sparse=(2, 4))
    for trace in (a,):
        trace.tensors["routing.4"] = (trace.tensors["routing.4"] + X) % 8
    free = compare(a, b, oracle)
    assert (free.verdict, free.cause, free.whose) == ("FAIL", "router flip", "a")
    assert free.headline == "jax chose wrong experts in model.layers.3.mlp.gate"
    oracle_a = make_oracle(sparse=(2, 4))
    oracle_a.tensors["routing.4"] = a.tensors["routing.4"]
    replayed = compare(a, b, oracle_a, oracle_b=oracle)
    assert (replayed.verdict, replayed.cause, replayed.whose) == ("FAIL", "router flip", None)


def test_generated_tokens_of_a_row_that_flipped_prove_nothing():
    a, b, oracle = trio(sparse=(2,))
    for trace in (a, b):
        trace.tensors["generated_ids"] = np.zeros((B, 3), np.int64)
    flip(a, 2, 1, T - 1)
    a.tensors["generated_ids"][1, 0] = 5
    comparison = compare(a, b, oracle)
    assert (comparison.verdict, comparison.cause) == ("PASS", "router flip")


def test_a_trace_without_routing_beside_one_that_has_it_is_noted():
    a, b, oracle = trio(sparse=(2,))
    del b.tensors["routing.2"]
    comparison = compare(a, b, oracle)
    assert comparison.verdict == "PASS"
    assert any("second trace recorded no routing" in note for note in comparison.notes)
