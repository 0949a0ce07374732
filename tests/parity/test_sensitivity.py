"""What a comparison could have seen: faults of one percent, tried by the oracle, and planted in a backend."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from synthetic_traces import trio

from loaders import open_checkpoint
from parity.backends import open_backend
from parity.compare import compare
from parity.comparison.probes import places
from parity.comparison.text import render
from parity.oracle import oracle_forward
from parity.oracles.fault import Fault
from parity.record import record_model
from parity.record_oracle import record_oracle
from parity.trace import Trace
from parity.trace_layout import find_problems
from parity.zoo import make_checkpoint, prompts

LAYER = "model.layers.1"


class Bench:
    """A bfloat16 model of two layers in torch, the oracle's faults, and runs of it with weights that are off."""

    def __init__(self, directory) -> None:
        self.path = make_checkpoint("qwen3", directory, dtype="BF16", num_hidden_layers=2)
        self.checkpoint = open_checkpoint(self.path)
        self.inputs = prompts(self.checkpoint.config)
        self.torch = open_backend("torch")
        self.oracle = record_oracle(self.checkpoint, self.inputs)
        self.clean = self.run()
        self.peer = Trace(self.clean.tensors, self.clean.meta | {"backend": "peer"})

    def run(self, module: str = "", factor: float = 1.0, dtype: str = "bfloat16") -> Trace:
        """A weight is off after its digest was taken, as one that is stale or scaled twice would be."""
        model = self.torch.load(self.path, dtype=dtype)
        parameters = dict(model.named_parameters())
        assert not module or f"{module}.weight" in parameters
        if module:
            with torch.no_grad():
                parameters[f"{module}.weight"].mul_(factor)
        trace = record_model(model, self.torch, self.inputs)
        trace.meta["weights"] = self.oracle.meta["weights"]
        return trace


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("sensitivity") / "checkpoint")


def test_the_oracle_tries_every_kind_of_weight_in_every_layer(bench):
    documents = {document["module"]: document for document in bench.oracle.meta["probes"]}
    assert set(documents) == {name.removesuffix(".weight") for name in bench.checkpoint.tensors}
    assert find_problems(bench.oracle.tensors, bench.oracle.meta) == []
    kinds = {module for module, document in documents.items() if document["kind"] == "noise"}
    assert {module.rpartition(".")[2] for module in kinds} == {"q_proj", "k_proj"}  # a norm takes their scale out again
    assert documents[f"{LAYER}.mlp.down_proj"]["tensor"] == "hidden_states.2"
    assert documents["lm_head"]["moved"]["logits"] == pytest.approx(0.01)
    assert documents["lm_head"]["moved"]["final_hidden_state"] == 0


def test_a_scale_has_no_effect_behind_a_norm_and_noise_has(bench):
    module = f"{LAYER}.self_attn.k_proj"
    exact, scaled, noisy = (
        oracle_forward(bench.checkpoint, **bench.inputs, fault=fault)["logits"]
        for fault in (None, Fault(module, 0.01, "scale"), Fault(module, 0.01, "noise"))
    )
    np.testing.assert_allclose(scaled, exact, rtol=1e-4, atol=1e-4)
    assert np.abs(noisy - exact).max() > 1e-2


def test_a_correct_pair_passes_and_says_what_it_would_have_seen(bench):
    found = compare(bench.clean, bench.peer, bench.oracle)
    assert found.verdict == "PASS"
    assert sum(probe.is_seen for probe in found.probes) == len(found.probes) == 25
    assert "A weight 1 % off would have been seen in 25 of 25 places" in found.summary
    assert "scales of k_proj and q_proj, which a norm takes out again, by the weights' digests alone" in found.summary
    assert any("k_proj" in note and "digests of the weights do, and are equal" in note for note in found.notes)
    by_size = [probe.least_by_size for probe in found.probes if probe.module.endswith("_proj")]
    assert max(by_size) > 0.01  # in bfloat16 the ruler alone would not have


@pytest.mark.parametrize(
    "module",
    [
        *("lm_head", "model.norm", f"{LAYER}.mlp.down_proj", f"{LAYER}.mlp.gate_proj", f"{LAYER}.self_attn.q_norm"),
        *("model.layers.0.self_attn.o_proj", "model.layers.0.input_layernorm"),
    ],
)
def test_one_percent_planted_in_a_weight_fails_and_the_weight_is_named(bench, module):
    found = compare(bench.run(module, 1.01), bench.clean, bench.oracle)
    assert (found.verdict, found.cause, found.whose) == ("FAIL", "bug", "a")
    assert module in found.summary
    assert "too large" in found.summary
    (probe,) = (probe for probe in found.probes if probe.module == module)
    assert 0.008 < probe.factor_a < 0.012
    assert abs(probe.factor_b) < 0.003


def test_the_same_in_the_peer_is_the_peers_and_in_both_is_both(bench):
    wrong = bench.run("lm_head", 0.99)
    found = compare(bench.clean, wrong, bench.oracle)
    assert (found.verdict, found.cause, found.whose) == ("FAIL", "peer is the outlier", "b")
    assert "too small" in found.summary
    found = compare(wrong, Trace(wrong.tensors, wrong.meta | {"backend": "peer"}), bench.oracle)
    assert (found.verdict, found.cause, found.whose) == ("FAIL", "both wrong", "both")


def test_a_prompt_that_is_too_short_to_see_anything_is_inconclusive(bench):
    inputs = {"input_ids": np.array([[3, 14, 15]])}
    trace = record_model(bench.torch.load(bench.path, dtype="bfloat16"), bench.torch, inputs)
    peer = Trace(trace.tensors, trace.meta | {"backend": "peer"})
    found = compare(trace, peer, record_oracle(bench.checkpoint, inputs))
    assert (found.verdict, found.exit_code) == ("INCONCLUSIVE", 4)
    assert "self_attn" in found.summary
    assert "more tokens" in found.summary


def test_in_float32_the_ruler_sees_far_less_than_one_percent(bench):
    trace = bench.run(dtype="float32")
    peer = Trace(trace.tensors, trace.meta | {"backend": "peer"})
    found = compare(trace, peer, bench.oracle)
    assert found.verdict == "PASS"
    assert max(probe.least for probe in found.probes) < 1e-4


def test_an_oracle_that_tried_nothing_is_noted_and_is_no_reason_to_fail():
    found = compare(*trio())
    assert found.verdict == "PASS"
    assert any("tried no faults" in note for note in found.notes)
    assert "tried no faults" in render(found)


def test_places_are_bounded_evenly_taken_and_counted(bench):
    few = places(bench.checkpoint, 5)
    assert len(few) == 5
    assert {"model.embed_tokens", "lm_head"} <= set(few)
    assert places(bench.checkpoint, 0) == {}
    with pytest.raises(ValueError, match="-1 places"):
        places(bench.checkpoint, -1)


def test_norms_that_compute_with_one_plus_w_are_off_by_a_percent_of_that(tmp_path):
    checkpoint = open_checkpoint(make_checkpoint("gemma3", tmp_path / "gemma"))
    assert places(checkpoint)["model.norm"] == 1.0
    assert places(checkpoint)["model.layers.0.mlp.up_proj"] == 0.0


@pytest.mark.parametrize("probes", [[{"module": "x"}], [3], {"a": 1}])
def test_faults_that_are_not_documented_are_refused(probes):
    ours, peer, oracle = trio()
    bad = Trace(oracle.tensors, oracle.meta | {"probes": probes})
    with pytest.raises(ValueError, match=r"probes\[0\]"):
        compare(ours, peer, bad)


def test_a_response_of_another_shape_is_refused(bench):
    bad = copy.copy(bench.oracle)
    name = next(name for name in bad.tensors if name.startswith("probe."))
    bad.tensors = bad.tensors | {name: bad.tensors[name][:, 1:]}
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        compare(bench.clean, bench.peer, bad)
