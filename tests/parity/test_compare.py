import json

import numpy as np
import pytest
from synthetic_traces import B, T, V, add_error, make_backend, make_oracle, mask_out, trio

import parity
from parity import Comparison, Trace, compare

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


@pytest.mark.parametrize("stray", ["hidden_states.900000000", "routing.900000000"])
@pytest.mark.parametrize("has_oracle", [True, False])
def test_a_layer_that_one_trace_alone_names_opens_no_lid(stray, has_oracle):
    """L is the number of layers that two of the traces have; a lid of 900,000,000 layers would let anything pass."""
    oracle = make_oracle()
    a, b = (make_backend(oracle, name, seed, scale=100) for name, seed in (("jax", 1), ("torch", 2)))
    before = compare(a, b, oracle if has_oracle else None)
    kind = oracle.tensors["hidden_states.1"].astype(np.float32)
    b.tensors[stray] = kind if "hidden" in stray else np.zeros((*kind.shape[:2], 2), np.int64)
    after = compare(a, b, oracle if has_oracle else None)
    assert (before.verdict, after.verdict) == ("FAIL", "FAIL")
    assert (after.num_layers, after.rows) == (before.num_layers, before.rows)


def test_layers_are_counted_where_the_peer_has_logits_alone():
    a, b, _ = trio()
    b.tensors = {name: b.tensors[name] for name in ("logits", "input_ids", "attention_mask")}
    assert compare(a, b).num_layers == 4


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
