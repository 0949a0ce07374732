"""Bisection: the culprit is named, down to the operation and on the right side; correct pairs are left alone."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import parity
from loaders import open_checkpoint
from parity.backends import open_backend
from parity.bisect import bisect, local_errors
from parity.cli import main
from parity.lifecycle.live_pairs import rerun
from parity.local import Judge, Said
from parity.model_backend import ModelBackend
from parity.mutants import all_mutants
from parity.mutants.bench import Bench
from parity.mutants.detectors import Remembered
from parity.mutants.layer import in_layer
from parity.mutants.plants import MOE, wrapped
from parity.record import default_inputs, record_model
from parity.zoo import ZOO, make_checkpoint, prompts
from parity.zoo.adapters import make_adapter

MUTANTS = all_mutants()
# mutant, layer, the step that is to be named
ATTENTION = [
    ("qk_norm_swapped", 1, "self_attn.q_norm"),
    ("k_norm_weight_dropped", 1, "self_attn.k_norm"),
    ("rope_sign", 0, "self_attn.q_rotated"),
    ("kv_heads_tiled", 1, "self_attn.attention"),
    ("scale_from_hidden", 0, "self_attn.attention"),
    ("bias_dropped", 1, "self_attn.q_proj"),
    ("block_norms_swapped", 1, "input_layernorm"),
    ("gate_up_swapped", 1, "mlp.gate_proj"),
    ("score_cap_over_mask", 1, "self_attn.attention"),
    ("feedforward_norms_swapped", 0, "pre_feedforward_layernorm"),
]
EXPERTS = [
    ("gelu_in_experts", 0, "mlp.experts.product"),
    ("top_k_weights_permuted", 0, "mlp.gate.weights"),
    ("sigmoid_router", 0, "mlp.gate.weights"),
    ("capacity_drop", 0, "mlp.experts"),
    ("fused_gate_up_swapped", 1, "mlp.experts.gate_proj"),
    ("shared_gate_dropped", 1, "mlp"),
]
DELTA = [
    ("gated_norm_sigmoid", 0, "linear_attn.norm"),
    ("dt_bias_dropped", 0, "linear_attn.decay"),
    ("conv_reversed", 0, "linear_attn.conv1d"),
    ("query_scale_missing", 0, "linear_attn.delta_rule"),
    ("attention_gate_dropped", 1, "self_attn.gated"),
    ("one_not_added", 1, "input_layernorm"),
]
QUICK = (
    *("qk_norm_swapped-*-F32", "gate_up_swapped-*-BF16", "sigmoid_router-*-F32", "conv_reversed-*-BF16"),
    *("rope_sign-*-BF16", "feedforward_norms_swapped-*-F32"),
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def torch_backend():
    return open_backend("torch")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A checkpoint of the zoo, made once."""
    made = {}

    def get(name, dtype="F32"):
        if (name, dtype) not in made:
            made[name, dtype] = make_checkpoint(name, tmp_path_factory.mktemp("zoo") / "checkpoint", dtype=dtype)
        return open_checkpoint(made[name, dtype])

    return get


def kept(bench, backend, subject):
    checkpoint = open_checkpoint(bench.path(subject))
    return bench.once(
        ("kept", subject),
        lambda: Remembered(ModelBackend(backend.load(checkpoint.source), backend), bench.batch(subject)),
    )


def found_by(bench, mutant, backend):
    """A bisection of the clean torch model and the mutant."""
    torch, checkpoint = open_backend("torch"), open_checkpoint(bench.path(mutant.subject))
    clean, inputs = kept(bench, torch, mutant.subject), bench.batch(mutant.subject)
    with mutant.planted(backend.name):
        mutated = ModelBackend(backend.load(checkpoint.source), backend, "mutant")
        return bisect(clean, mutated, inputs, checkpoint=checkpoint, crossed=False)


@pytest.mark.slow_unless(*QUICK)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(("name", "layer", "step"), ATTENTION + EXPERTS + DELTA)
def test_a_bug_in_one_layer_is_named_to_the_operation(bench, torch_backend, name, layer, step, dtype):
    mutant = MUTANTS[name]
    mutant = in_layer(replace(mutant, subject=replace(mutant.subject, dtype=dtype)), layer)
    found = found_by(bench, mutant, torch_backend)
    assert found.exit_code == 1
    assert found.culprit.path == f"model.layers.{layer}.{step}"
    assert found.culprit.blame == "b"
    assert [one.path for one in found.tables[0][1] if one.blame] in (
        [f"model.layers.{layer}"],
        [f"model.layers.{layer}.mlp.gate", f"model.layers.{layer}"],
    )
    assert f"mutant computes model.layers.{layer}.{step} differently: local error" in found.summary


@pytest.mark.slow_unless("qk_norm_swapped-*")
@pytest.mark.parametrize(("name", "layer", "step"), [ATTENTION[0], ATTENTION[7], EXPERTS[1], DELTA[0]])
def test_a_bug_of_jax_is_named_and_is_jaxs(bench, name, layer, step):
    found = found_by(bench, in_layer(MUTANTS[name], layer), open_backend("jax"))
    assert (found.culprit.path, found.culprit.blame) == (f"model.layers.{layer}.{step}", "b")


def test_a_router_that_chooses_others_is_named(bench, torch_backend):
    next_one = wrapped("layers.moe:TopKRouter.CALL", lambda run, self, x: ((f := run(self, x))[0], (f[1] + 1) % 5))
    mutant = in_layer(replace(MUTANTS["top_k_weights_permuted"], plant=next_one, subject=MOE), 0)
    found = found_by(bench, mutant, torch_backend)
    assert found.culprit.path == "model.layers.0.mlp.gate"
    assert found.culprit.blame == "b"


def test_what_a_layer_hides_is_found_inside_when_asked(bench, torch_backend):
    mutant = in_layer(MUTANTS["k_norm_eps_too_large"], 1)
    checkpoint, inputs = open_checkpoint(bench.path(mutant.subject)), bench.batch(mutant.subject)
    clean = kept(bench, torch_backend, mutant.subject)
    with mutant.planted("torch"):
        mutated = ModelBackend(torch_backend.load(checkpoint.source), torch_backend, "mutant")
        found = [
            bisect(clean, mutated, inputs, checkpoint=checkpoint, crossed=False, everywhere=everywhere)
            for everywhere in (False, True)
        ]
    assert found[0].culprit is None
    assert (found[1].culprit.path, found[1].culprit.blame) == ("model.layers.1.self_attn.k_norm", "b")
    looked_into = [name for name, _ in found[1].tables]
    assert looked_into[:4] == ["the model", "model.layers.0", "model.layers.0.self_attn", "model.layers.0.mlp"]
    assert "Everything before it agrees" in found[1].summary


def test_looking_everywhere_finds_nothing_in_a_correct_model(zoo, torch_backend):
    checkpoint = zoo("qwen3")
    live = ModelBackend(torch_backend.load(checkpoint.source), torch_backend)
    found = bisect(live, live, prompts(checkpoint.config), checkpoint=checkpoint, everywhere=True, crossed=False)
    assert found.exit_code == 0
    assert len(found.tables) == 1 + 3 * checkpoint.config.num_hidden_layers


@pytest.mark.parametrize(("name", "step"), [("final_norm_dropped", "model.norm"), ("head_rows_plus_one", "lm_head")])
def test_what_is_around_the_layers_is_named_too(bench, torch_backend, name, step):
    found = found_by(bench, MUTANTS[name], torch_backend)
    assert found.culprit.path == step
    assert "Everything before it agrees" in found.summary


def test_without_an_oracle_the_step_is_named_and_not_whose_it_is(bench, torch_backend):
    mutant = in_layer(MUTANTS["qk_norm_swapped"], 1)
    checkpoint, inputs = open_checkpoint(bench.path(mutant.subject)), bench.batch(mutant.subject)
    clean = kept(bench, torch_backend, mutant.subject)

    class Fed(Remembered):  # feeding it would run the mutant; what it makes of the other's values is left out here
        def taps(self, inputs, *, inject=None, **where):
            return Remembered.taps(self, inputs, **where)

    fed = Fed.__new__(Fed)
    vars(fed).update(vars(clean))
    with mutant.planted("torch"):
        mutated = ModelBackend(torch_backend.load(checkpoint.source), torch_backend, "mutant")
        steps = local_errors(mutated, mutated, inputs, list(clean.layers), found=(clean.layers, mutated.taps(inputs)))
    wrong = [step for step in steps if step.blame]
    assert [step.path for step in wrong] == ["model.layers.1"]
    assert wrong[0].blame == "unknown"
    assert wrong[0].local_a is None


@pytest.mark.slow_unless("qwen3_5-moe-BF16", "gemma3-capped-F32")
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", ZOO)
def test_nothing_stands_out_in_any_layer_of_torch_fed_its_own_values(zoo, torch_backend, name, dtype):
    checkpoint = zoo(name, dtype)
    live = ModelBackend(torch_backend.load(checkpoint.source), torch_backend)
    inputs = default_inputs(checkpoint)
    found = bisect(live, live, inputs, checkpoint=checkpoint, layer=1, crossed=False)
    assert found.exit_code == 0, found.to_text()
    assert found.summary.startswith("Nothing stands out")
    assert found.tables[1][0].endswith("layers.1")


@pytest.mark.slow_unless("qwen3-BF16")
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", ZOO)
def test_nothing_stands_out_between_jax_and_torch(zoo, torch_backend, name, dtype):
    checkpoint, jax = zoo(name, dtype), open_backend("jax")
    sides = [ModelBackend(backend.load(checkpoint.source), backend) for backend in (jax, torch_backend)]
    found = parity.bisect(*sides, checkpoint=checkpoint)
    assert found.exit_code == 0, found.to_text()
    fed = [step for step in found.tables[0][1] if step.path == "model.layers.1"]
    assert all(step.fed_a < 2 * step.limit for step in fed)


def test_handing_one_sides_value_to_the_other_gives_a_trace(zoo, torch_backend):
    checkpoint, other = zoo("qwen3"), zoo("qwen3-bias")
    a, b = (ModelBackend(torch_backend.load(one.source), torch_backend) for one in (checkpoint, other))
    inputs = prompts(checkpoint.config, rows=2, tokens=24)
    plain = record_model(b.model, torch_backend, inputs)
    trace = rerun(a, b, inputs, "model.layers.1")
    np.testing.assert_array_equal(trace.tensors["hidden_states.2"], plain.tensors["hidden_states.2"])
    assert not np.allclose(trace.tensors["hidden_states.3"], plain.tensors["hidden_states.3"], atol=0.1)
    assert trace.tensors.keys() == plain.tensors.keys()
    with pytest.raises(ValueError, match=r"torch: within='layers\.1' names nothing"):
        rerun(a, b, inputs, "layers.1")


def test_what_cannot_be_compared_is_an_error_that_says_why(zoo, torch_backend):
    checkpoint = zoo("qwen3")
    full, half = (
        ModelBackend(torch_backend.load(checkpoint.source, dtype=dtype), torch_backend)
        for dtype in ("float32", "bfloat16")
    )
    inputs = prompts(checkpoint.config, rows=2, tokens=24)
    with pytest.raises(ValueError, match="torch computes in float32 and torch in bfloat16"):
        bisect(full, half, inputs)
    with pytest.raises(ValueError, match="no decoder layer 7, expected one of"):
        bisect(full, full, inputs, layer=7, checkpoint=checkpoint, crossed=False)
    with pytest.raises(ValueError, match="needs inputs, or a checkpoint"):
        bisect(full, full)


def test_a_choice_between_equals_is_no_error_and_a_bad_one_is_as_large_as_what_was_lost():
    mask = np.ones((1, 2), bool)
    scores = np.array([[[3.0, 2.0, 2.0 - 1e-7, 0.0], [1.0, 2.0, 3.0, 4.0]]])
    told = {"gate.logits": scores}
    judge, ours = Judge("float32", mask), np.array([[[0, 1], [3, 2]]])

    def step(chosen):
        return judge.step("gate", ({"gate": chosen}, {"gate": ours}), (None, None), [Said(told, told, told)] * 2)

    assert step(np.array([[[2, 0], [2, 3]]])).blame is None
    assert step(np.array([[[0, 3], [3, 2]]])).blame == "a"
    assert step(np.array([[[0, 0], [3, 2]]])).blame == "a"


@pytest.mark.parametrize("options", [[], ["--no-oracle"], ["--layer", "2"]], ids=["plain", "no oracle", "one layer"])
def test_the_command_says_that_nothing_stands_out(zoo, tmp_path, capsys, options):
    checkpoint, report = zoo("qwen3", "BF16"), tmp_path / "found.json"
    code = main(["bisect", str(checkpoint.source), "--a", "torch", "--json", str(report), *options])
    printed = capsys.readouterr().out
    assert code == 0
    assert "Nothing stands out" in printed
    assert "torch (a)" in printed
    assert "torch (b)" in printed
    found = json.loads(report.read_text())
    assert found["exit_code"] == 0
    assert [table["of"] for table in found["tables"]] == [
        "the model",
        *(["model.layers.2", "model.layers.2.self_attn", "model.layers.2.mlp"] if "--layer" in options else []),
    ]
    assert ("\n  up_proj " in printed) == ("--layer" in options)
    assert ("--everywhere may" in printed) == ("--layer" not in options)


def test_the_command_knows_of_an_adapter(zoo, tmp_path, capsys):
    path = zoo("qwen3", "BF16").source
    adapter = make_adapter(path, tmp_path / "adapter", targets=("q_proj", "o_proj", "up_proj"))
    assert main(["bisect", str(path), "--a", "torch", "--adapter", str(adapter), "--layer", "1"]) == 0
    assert "Nothing stands out" in capsys.readouterr().out
