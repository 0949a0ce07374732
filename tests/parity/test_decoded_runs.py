"""Decoding under parity: the taps of the very steps that serve, and a bug of one layer's decoding named as such."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

import jax_models
import torch_models
from loaders import open_checkpoint
from loaders.host.stepwise import stepwise
from parity.asserting import Oracle
from parity.backends import open_backend
from parity.bisect import bisect
from parity.cli import main
from parity.local import distance
from parity.model_backend import ModelBackend
from parity.mutants import all_mutants
from parity.mutants.layer import in_layer
from parity.mutants.plants import wrapped
from parity.pairs import ONLY_DECODED, run_pair
from parity.record import default_inputs, record, record_model, row_alone
from parity.trace import Trace
from parity.zoo import make_checkpoint, prompts

LAYER = 1
BACKENDS = {"jax": jax_models, "torch": torch_models}
SIZES = {"qwen3": {"num_hidden_layers": 2}, "qwen3-moe": {"num_hidden_layers": 2}, "qwen3_vl": {}, "gemma3": {}}
SIZES["qwen3_5-moe"] = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A checkpoint by name, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = make_checkpoint(name, tmp_path_factory.mktemp("decoded") / "c", dtype="F32", **SIZES[name])
        return made[name]

    return get


@pytest.mark.slow_unless("qwen3-*", "qwen3-moe-torch", "qwen3_5-moe-torch", "qwen3_vl-torch")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SIZES)
def test_what_is_looked_at_is_what_prefill_and_decode_compute(path, name, backend):
    model = BACKENDS[backend].load(path(name))
    inputs = default_inputs(model.checkpoint)
    logits, taps = model.with_taps(**inputs, decode=3)
    whole, plain = model.with_taps(**inputs)
    assert list(taps) == list(plain)
    mask = inputs["attention_mask"].astype(bool)
    for path_, value in {"logits": logits, **taps}.items():
        expected = np.asarray(plain.get(path_, whole))
        if expected.dtype.kind == "f":
            assert distance(np.asarray(value), expected, mask) < 2e-5, path_
    given = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    _, checked = model.checked(inputs["input_ids"], inputs["attention_mask"], None, None, given)
    rows = stepwise(model.config, checked, inputs["input_ids"], position_ids=None, given=given, steps=3)
    step, cache = model.prefill(rows.input_ids, rows.attention_mask, max_new_tokens=3, **rows.multimodal)
    ends = [np.flatnonzero(row)[-4:] for row in mask]
    for index, token in enumerate([*rows.token_NB, None]):
        told = np.stack([np.asarray(logits)[row, end[index]] for row, end in enumerate(ends)])
        np.testing.assert_array_equal(told, np.asarray(step))  # bit for bit: looking changes nothing
        if token is not None:
            step, cache = model.decode(token, cache)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_of_decoding_goes_on_from_what_is_handed_in(path, backend):
    model = BACKENDS[backend].load(path("qwen3"))
    inputs = prompts(model.config, rows=2, tokens=24)
    logits, taps = model.with_taps(**inputs, decode=3)
    same, _ = model.with_taps(**inputs, decode=3, inject={"model.layers.0": taps["model.layers.0"]})
    np.testing.assert_array_equal(np.asarray(same), np.asarray(logits))
    other = np.asarray(taps["model.layers.0"]).copy()
    other[0, -2:] *= 1.5  # the first row's last two tokens, which are decoded
    moved, _ = model.with_taps(**inputs, decode=3, inject={"model.layers.0": other})
    is_moved = np.abs(np.asarray(moved) - np.asarray(logits)).max(axis=-1) > 0
    assert is_moved[0, -2:].all()
    assert not is_moved[0, :-2].any()
    assert not is_moved[1].any()


def forgets_values(remembered, k, v, *rest):
    return remembered(k, v if v.shape[1] > 1 else 0 * v, *rest)


@pytest.mark.parametrize("side", BACKENDS)
def test_a_bug_of_one_layers_decoding_is_caught_by_run_and_named_down_to_the_step(path, side):
    mutant = replace(
        all_mutants()["cache_slot_before"],
        plant=wrapped("layers.attention:remembered", forgets_values),
        backends=("torch", "jax"),
    )
    sides = tuple(open_backend(name) for name in BACKENDS)
    checkpoint = path("qwen3")
    with in_layer(mutant, LAYER).planted(side):
        found = run_pair(checkpoint, sides)
        models = [ModelBackend(one.load(checkpoint), one, decode=8) for one in sides]
        inputs = default_inputs(open_checkpoint(checkpoint))
        bisected = bisect(*models, inputs, checkpoint=open_checkpoint(checkpoint), layer=LAYER, crossed=False)
    (_, whole), (title, decoded), (_, alone) = found.comparisons
    assert whole.verdict == "PASS"
    assert decoded.detail.endswith(ONLY_DECODED)
    assert ONLY_DECODED not in whole.summary
    assert title == "jax against torch, the last 8 tokens decoded"
    assert decoded.verdict == alone.verdict == "FAIL"
    assert alone.headline == decoded.headline
    assert alone.commands[0].endswith(f"--decode 8 --row 0 --layer {LAYER}")
    assert decoded.headline == f"{side} is wrong in model.layers.{LAYER}"
    assert decoded.worst_token.position >= 40  # of the last eight of some row
    assert decoded.commands[0].endswith(f"--decode 8 --layer {LAYER}")
    assert bisected.culprit.path == f"model.layers.{LAYER}.self_attn.attention"
    assert bisected.culprit.blame == ("a" if side == "jax" else "b")


def test_run_says_what_it_decoded_and_what_it_could_not(path, tmp_path, capsys):
    checkpoint = str(path("qwen3-moe"))
    config = open_checkpoint(checkpoint).config
    inputs = prompts(config, rows=2, tokens=10)
    save_file(inputs, tmp_path / "short")
    save_file(inputs | {"position_ids": np.tile(np.arange(10), (2, 1))}, tmp_path / "positions")
    least = int(inputs["attention_mask"].sum(axis=1).min()) - 1
    common = ["run", checkpoint, "--a", "torch", "--json", str(tmp_path / "json"), "--inputs"]
    main([*common, str(tmp_path / "short")])
    titles = [one["title"] for one in json.loads((tmp_path / "json").read_text())["comparisons"]]
    decoded = f"the last {least} tokens decoded"
    assert titles == [
        "torch against torch",
        f"torch against torch, {decoded}",
        "torch against torch, row 0 decoded alone",
    ]
    assert f"{titles[1]}: " in capsys.readouterr().out
    main([*common, str(tmp_path / "positions")])
    assert "note: decoding was not compared: position_ids were given" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "json").read_text())["comparisons"]) == 1
    (tmp_path / "json").unlink()
    assert main([*common, str(tmp_path / "short"), "--decode", "0"]) != 2
    assert "decod" not in capsys.readouterr().out
    assert len(json.loads((tmp_path / "json").read_text())["comparisons"]) == 1
    assert main([*common, str(tmp_path / "short"), "--decode", "8"]) == 2
    assert "decode=8, expected 1 to" in capsys.readouterr().err


def alone_wrong(original, self, x, *rest):
    return original(self, x, *rest) * (1.01 if len(x) == 1 else 1)


@pytest.mark.slow
def test_kernels_of_a_single_row_are_seen_too_and_shown_again_alone(path, capsys):
    """A batch has other shapes than a row by itself, and products of other shapes are other code."""
    mutant = replace(
        all_mutants()["cache_slot_before"],
        plant=wrapped("layers.moe:Experts._of_hit", alone_wrong),
        backends=("torch",),
    )
    torch = open_backend("torch")
    with in_layer(mutant, 0).planted("torch"):
        found = run_pair(path("qwen3-moe"), (open_backend("jax"), torch))
        assert [one.verdict for _, one in found.comparisons] == ["PASS", "PASS", "FAIL"]
        command = found.comparisons[2][1].commands[0].split()
        assert main(command[1:]) == 1
    assert "torch computes model.layers.0.mlp.experts" in capsys.readouterr().out


def test_a_decoded_trace_says_so_and_takes_the_digests_it_is_given(path):
    torch = open_backend("torch")
    trace = record(path("qwen3"), torch, decode=4)
    assert trace.meta["decode"] == 4
    assert trace.meta["weights"]["root"]
    known = Trace(trace.tensors, trace.meta | {"weights": {"digests": {}, "root": "known"}})
    again = record_model(
        torch.load(path("qwen3")), torch, default_inputs(open_checkpoint(path("qwen3"))), weights_of=known
    )
    assert again.meta["weights"]["root"] == "known"


def test_a_row_alone_has_no_padding_and_is_refused_where_it_cannot_be():
    inputs = {"input_ids": np.arange(1, 9).reshape(2, 4), "attention_mask": np.array([[1] * 4, [0, 0, 1, 1]])}
    alone = row_alone(inputs, 1)
    np.testing.assert_array_equal(alone["input_ids"], [[7, 8]])
    np.testing.assert_array_equal(alone["attention_mask"], [[1, 1]])
    with pytest.raises(ValueError, match=r"row 2 of 2 rows: expected 0 to 1"):
        row_alone(inputs, 2)
    with pytest.raises(ValueError, match=r"row 0 of 2 rows, and pixel_values beside"):
        row_alone(inputs | {"pixel_values": np.zeros(1)}, 0)


def test_an_oracle_answers_the_same_experts_once_whatever_padding_chose(path):
    checkpoint = path("qwen3-moe")
    inputs = prompts(open_checkpoint(checkpoint).config, rows=2, tokens=24)
    trace = record(checkpoint, open_backend("torch"), inputs)
    padded = dict(trace.tensors)
    padded["routing.1"] = np.where(trace.mask[..., None], padded["routing.1"], padded["routing.1"][..., ::-1])
    other = padded | {"routing.1": padded["routing.1"][..., ::-1]}
    oracle = Oracle(checkpoint, probes=0)
    first = oracle(inputs, trace)
    assert oracle(inputs, Trace(padded, trace.meta)) is first
    assert oracle(inputs, Trace(other, trace.meta)) is not first
