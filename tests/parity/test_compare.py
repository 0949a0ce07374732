import json

import numpy as np
import pytest
from synthetic_traces import B, T, V, X, add_error, make_backend, make_oracle, trio

import parity
from parity import Comparison, Trace, compare


def flip(trace, layer: int, row: int, position: int) -> None:
    """Swap one chosen expert for one that was not."""
    experts = trace.tensors[f"routing.{layer}"] = trace.tensors[f"routing.{layer}"].copy()
    experts[row, position, 0] = next(e for e in range(99) if e not in experts[row, position])


def mask_out(traces, row: int, positions: slice) -> None:
    for trace in traces:
        trace.tensors["attention_mask"] = trace.tensors["attention_mask"].copy()
        trace.tensors["attention_mask"][row, positions] = 0


# Rounding, bugs, and whose


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rounding_sized_noise_passes_in_both_directions(dtype):
    a, b, oracle = trio(dtype)
    for comparison in (compare(a, b, oracle), compare(b, a, oracle)):
        assert (comparison.verdict, comparison.cause, comparison.whose) == ("PASS", None, None)
        assert comparison.divergence is None
        assert all(row.verdict == "PASS" and row.margin > 0 and row.token_margin > 0 for row in comparison.rows)
        assert "agree to within rounding" in comparison.summary


def test_a_tenfold_error_at_layer_3_fails_and_names_layer_3():
    a, b, oracle = trio()
    add_error(a, oracle, from_layer=3, times=10)
    comparison = compare(a, b, oracle)
    assert (comparison.verdict, comparison.cause, comparison.whose) == ("FAIL", "bug", "a")
    found = comparison.divergence
    assert (found.tensor, found.layer, found.side, found.suspect) == ("hidden_states.3", 3, "a", "hidden_states.3")
    assert found.growth == pytest.approx(12, rel=0.2)  # 10 times sqrt(3/2)
    assert 0.9 * found.after < found.local < found.after
    assert found.inherited == pytest.approx(found.before * found.usual_growth)
    for part in ("jax is wrong in model.layers.2", "torch is within its own", "begins here"):
        assert part in comparison.summary
    assert [row.name for row in comparison.rows if row.verdict == "PASS"] == [f"hidden_states.{i}" for i in range(3)]


def test_the_same_error_in_the_peer_is_the_peers():
    a, b, oracle = trio()
    add_error(b, oracle, from_layer=3, times=10)
    comparison = compare(a, b, oracle)
    assert (comparison.verdict, comparison.cause, comparison.whose) == ("FAIL", "peer is the outlier", "b")
    assert comparison.divergence.side == "b"
    assert comparison.headline == "torch is wrong in model.layers.2"
    assert comparison.kind == "FAIL (bug)"  # whose it is, the headline says; machines get the kind itself


def test_over_the_ruler_but_under_the_lid_is_rounding_sized():
    a, b, oracle = trio()
    add_error(a, oracle, from_layer=1, times=3)
    comparison = compare(a, b, oracle)
    assert (comparison.verdict, comparison.cause, comparison.whose) == ("FAIL", "rounding", "a")
    assert comparison.divergence.suspect is None
    assert "builds up" in comparison.summary


def test_a_sharp_step_under_the_lid_is_rounding_sized_but_called_suspect():
    oracle = make_oracle(layers=64)  # deep, so the lid is far away
    a, b = make_backend(oracle, "jax", 1), make_backend(oracle, "torch", 2)
    reference = oracle.tensors["hidden_states.3"]
    a.tensors["hidden_states.3"] = (reference + 10 * (a.tensors["hidden_states.3"] - reference)).astype(np.float32)
    comparison = compare(a, b, oracle)
    assert (comparison.cause, comparison.divergence.suspect) == ("rounding", "hidden_states.3")
    assert "suspect a small bug" in comparison.summary


def test_two_equally_wrong_backends_fail_by_the_lid():
    a, b, oracle = trio()
    for trace in (a, b):
        add_error(trace, oracle, from_layer=2, times=40)
    comparison = compare(a, b, oracle)
    assert (comparison.verdict, comparison.cause, comparison.whose) == ("FAIL", "both wrong", "both")
    assert comparison.divergence.tensor == "hidden_states.2"
    assert "jax and torch are both wrong" in comparison.headline


def test_one_bad_token_fails_although_the_tensor_passes_and_is_named():
    oracle = make_oracle(shape=(4, 60))
    a, b = make_backend(oracle, "jax", 1), make_backend(oracle, "torch", 2)
    reference = oracle.tensors["hidden_states.2"][1, 17]
    a.tensors["hidden_states.2"][1, 17] = reference + 15 * (a.tensors["hidden_states.2"][1, 17] - reference)
    comparison = compare(a, b, oracle)
    row = next(row for row in comparison.rows if row.name == "hidden_states.2")
    assert row.margin > 0 > row.token_margin
    assert (row.worst_token.row, row.worst_token.position) == (1, 17)
    assert (comparison.verdict, comparison.worst_token) == ("FAIL", row.worst_token)
    # The story is that of the token, whose own error jumped, not of the tensor, whose error did not.
    assert comparison.divergence.suspect == "hidden_states.2"
    assert "row 1, position 17" in comparison.summary


def test_without_an_oracle_agreement_passes_and_says_what_it_cannot_know():
    a, b, _ = trio()
    comparison = compare(a, b)
    assert comparison.verdict == "PASS"
    assert all(row.basis == "direct" and row.e_a is None for row in comparison.rows)
    assert "without an oracle" in comparison.summary
    assert any("no oracle" in note for note in comparison.notes)


def test_without_an_oracle_a_bug_is_known_but_not_whose():
    a, b, oracle = trio()
    add_error(a, oracle, from_layer=3, times=30)
    comparison = compare(a, b)
    assert (comparison.verdict, comparison.cause, comparison.whose) == ("FAIL", "bug", None)
    assert comparison.divergence.tensor == "hidden_states.3"
    assert "whose fault it is is unknown" in comparison.summary


def test_an_error_handed_down_is_traced_to_where_it_began():
    a, b, oracle = trio()
    add_error(a, oracle, from_layer=3, times=10)  # seen at layer 3, yet over two lids only at layer 4
    found = compare(a, b).divergence
    assert (found.tensor, found.suspect) == ("hidden_states.4", "hidden_states.3")


# Padding, NaN, odd shapes


def test_garbage_at_padded_positions_is_ignored():
    a, b, oracle = trio()
    mask_out((a, b, oracle), 1, slice(0, 7))
    mask_out((a, b, oracle), 2, slice(15, None))
    clean = compare(a, b, oracle)
    for trace, garbage in ((a, np.nan), (b, np.inf), (oracle, 1e30)):
        for name in ("hidden_states.2", "logits"):
            trace.tensors[name] = trace.tensors[name].copy()
            trace.tensors[name][1, :7] = trace.tensors[name][2, 15:] = garbage
    comparison = compare(a, b, oracle)
    assert comparison.verdict == "PASS"
    assert comparison.rows == clean.rows
    assert comparison.rows[0].tokens == B * T - 7 - 5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_value_that_is_not_finite_at_a_real_position_is_a_bug_of_its_side(value, side):
    a, b, oracle = trio()
    (a, b)[side].tensors["hidden_states.2"][2, 4, 9] = value
    for comparison in (compare(a, b, oracle), compare(a, b)):
        assert (comparison.verdict, comparison.cause, comparison.whose) == ("FAIL", "bug", "ab"[side])
        assert comparison.divergence.tensor == "hidden_states.2"
        for part in (
            ("jax", "torch")[side] + " is wrong in model.layers.1",
            "row 2, position 4, channel 9",
            str(value),
        ):
            assert part in comparison.summary
        json.loads(comparison.to_json())


def test_nan_on_both_sides_is_a_bug_of_both():
    a, b, oracle = trio()
    for trace in (a, b):
        trace.tensors["logits"][0, 0, 0] = np.nan
    assert compare(a, b, oracle).whose == "both"


def test_a_nan_behind_a_router_flip_still_fails():
    a, b, oracle = trio(sparse=(1, 3))
    flip(a, 1, 0, 5)
    a.tensors["logits"][0, 9, 0] = np.nan
    comparison = compare(a, b, oracle)
    assert (comparison.verdict, comparison.cause) == ("FAIL", "bug")
    assert "row 0, position 9" in comparison.summary


def test_a_single_token_is_compared_like_any_other():
    a, b, oracle = trio(shape=(1, 1))
    assert compare(a, b, oracle).verdict == "PASS"
    assert compare(a, b).verdict == "PASS"
    add_error(a, oracle, from_layer=2, times=20)
    assert compare(a, b, oracle).divergence.tensor == "hidden_states.2"


def test_tensors_of_zeros_divide_by_nothing():
    a, b, oracle = trio()
    for trace in (a, b, oracle):
        for name in trace.tensors:
            if trace.tensors[name].dtype.kind == "f":
                trace.tensors[name] = np.zeros_like(trace.tensors[name])
    assert compare(a, b, oracle).verdict == "PASS"
    assert compare(a, b).verdict == "PASS"
    a.tensors["logits"][0, 0, 0] = 1e-3
    assert compare(a, b, oracle).verdict == "FAIL"
    assert compare(a, b).verdict == "FAIL"


def test_bitwise_equal_traces_have_the_whole_margin():
    a, _, oracle = trio()
    assert {row.margin for row in compare(a, a).rows} == {1.0}
    assert {row.margin for row in compare(a, a, Trace(a.tensors, oracle.meta)).rows} == {1.0}


def test_the_drafts_tensors_are_judged_over_one_token_less():
    a, b, oracle = trio()
    mask_out((a, b, oracle), 1, slice(15, None))
    for seed, trace in enumerate((oracle, a, b)):
        noise = 0.01 * np.random.default_rng(seed).standard_normal((B, T - 1, V)) if seed else 0
        trace.tensors["mtp.logits"] = (oracle.tensors["logits"][:, 1:] + noise).astype(np.float32)
    row = compare(a, b, oracle).rows[-1]
    assert (row.name, row.verdict, row.tokens) == ("mtp.logits", "PASS", B * (T - 1) - 5)


# What cannot be compared


def test_every_reason_against_comparing_is_listed_at_once():
    a, b, oracle = trio()
    b.meta |= {"dtype": "float32", "precision": {"matmul": "default"}, "input_hash": "0" * 64}
    b.meta["weights"] = {"digests": {}, "root": "beef" * 16}
    b.tensors["logits"] = b.tensors["logits"][..., :-1]
    comparison = compare(a, b, oracle)
    assert (comparison.verdict, comparison.exit_code, comparison.cause) == ("INVALID", 3, None)
    assert len(comparison.reasons) == 5
    for part in ("dtype differs", "'matmul' differs", "input hash differs", "weights root differs", "shape of logits"):
        assert part in comparison.summary
    assert comparison.rows == ()


def test_differing_weights_are_named_ten_at_most_and_then_counted():
    a, b, oracle = trio()
    names = [f"model.layers.{i}.weight" for i in range(13)]
    a.meta["weights"] = {"root": "1" * 64, "digests": dict.fromkeys(names, "x") | {"same": "x", "old": "x"}}
    b.meta["weights"] = {"root": "2" * 64, "digests": dict.fromkeys(names, "y") | {"same": "x", "new": "x"}}
    del oracle.meta["weights"]
    (reason,) = compare(a, b, oracle).reasons
    assert sum(f"{name}," in reason or f"{name} and" in reason for name in names) == 10
    assert "and 3 more" in reason
    assert "only in the first: old" in reason
    assert "new" in reason
    assert "same" not in reason.split("differ:")[1]


def test_a_precision_flag_that_only_one_side_knows_is_no_difference():
    a, b, oracle = trio()
    b.meta["precision"] = {"matmul": "highest", "allow_tf32": False}
    assert compare(a, b, oracle).verdict == "PASS"


def test_a_trace_without_weights_is_compared_and_that_is_said():
    a, b, oracle = trio()
    del b.meta["weights"]
    comparison = compare(a, b, oracle)
    assert comparison.verdict == "PASS"
    assert any("second trace" in note and "no weights block" in note for note in comparison.notes)


def test_without_input_hashes_the_inputs_themselves_are_compared():
    a, b, oracle = trio()
    for trace in (a, b, oracle):
        trace.meta["input_hash"] = ""
    assert compare(a, b, oracle).verdict == "PASS"
    b.tensors["input_ids"] = b.tensors["input_ids"] + 1
    assert "input_ids differs" in compare(a, b, oracle).summary
    del b.tensors["input_ids"]
    assert "same input" in compare(a, b, oracle).summary


def test_an_oracle_of_other_weights_or_inputs_or_with_nan_judges_nobody():
    for change in ("weights", "input_hash", "nan"):
        a, b, oracle = trio()
        if change == "weights":
            oracle.meta["weights"] = {"digests": {}, "root": "0" * 64}
        elif change == "input_hash":
            oracle.meta["input_hash"] = "0" * 64
        else:
            oracle.tensors["logits"][0, 3, 0] = np.nan
        comparison = compare(a, b, oracle)
        assert comparison.verdict == "INVALID"
        assert "the oracle" in comparison.summary


def test_traces_without_any_real_position_or_common_tensor_are_not_comparable():
    a, b, oracle = trio()
    mask_out((a, b, oracle), slice(None), slice(None))
    assert "unpadded" in compare(a, b, oracle).summary
    a, b, oracle = trio()
    a.tensors = {name: array for name, array in a.tensors.items() if name in ("logits", "input_ids")}
    b.tensors = {name: array for name, array in b.tensors.items() if name != "logits"}
    assert "in common" in compare(a, b, oracle).summary


def test_what_is_no_trace_at_all_and_half_a_pair_of_oracles_are_errors_of_the_caller():
    a, b, oracle = trio()
    with pytest.raises(ValueError, match="oracle_b"):
        compare(a, b, oracle_b=oracle)
    b.meta = {}
    with pytest.raises(ValueError, match="second trace"):
        compare(a, b, oracle)


# Tokens


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


# Routers


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


# The object


def test_each_verdict_has_its_exit_code():
    codes = {verdict: Comparison(verdict=verdict, summary="").exit_code for verdict in ("PASS", "FAIL", "INVALID")}
    assert codes == {"PASS": 0, "FAIL": 1, "INVALID": 3}
    assert Comparison(verdict="INCONCLUSIVE", summary="").exit_code == 4
    skipped = Comparison.skipped("no CUDA device")
    assert (skipped.exit_code, skipped.verdict) == (5, "SKIP")
    assert "no CUDA device" in skipped.summary


def test_json_and_text_carry_the_verdict_the_rows_and_the_sentence():
    a, b, oracle = trio()
    add_error(a, oracle, from_layer=3, times=10)
    comparison = compare(a, b, oracle)
    document = json.loads(comparison.to_json())
    assert (document["verdict"], document["cause"], document["exit_code"]) == ("FAIL", "bug", 1)
    assert document["divergence"]["tensor"] == "hidden_states.3"
    assert [row["name"] for row in document["rows"]] == [row.name for row in comparison.rows]
    text = comparison.to_text()
    assert text.startswith("FAIL (bug): jax is wrong in model.layers.2.")
    assert all(row.module in text for row in comparison.rows)


def test_the_text_of_a_deep_model_shows_what_fails_and_counts_the_rest():
    a, b, oracle = trio(layers=60)
    add_error(a, oracle, from_layer=31, times=10)
    text = compare(a, b, oracle).to_text()
    assert "model.layers.29 " in text
    assert "model.layers.30 " in text
    assert "model.layers.9 " not in text
    assert "hidden_states" not in text  # one name for one place
    assert len(text.splitlines()) < 40


def test_a_comparison_of_two_runs_of_one_backend_tells_them_apart():
    oracle = make_oracle()
    comparison = compare(make_backend(oracle, "torch", 1), make_backend(oracle, "torch", 2), oracle)
    assert comparison.labels == ("torch (a)", "torch (b)")


def test_compare_can_be_called_as_a_function_of_the_package_and_imported_from_its_module():
    from parity.compare import compare as function

    a, b, oracle = trio()
    assert parity.compare(a, b, oracle).rows == function(a, b, oracle).rows
    assert {"compare", "Trace", "Comparison"} <= set(dir(parity))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        parity.nothing_of_the_kind  # noqa: B018
