"""Runs under an adapter: what was compared with what, and the command that shows a failure again."""

from __future__ import annotations

import shlex

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parity.asserting import hold
from parity.backends import open_backend
from parity.cli import main
from parity.compare import compare
from parity.model_backend import ModelBackend
from parity.record import record
from parity.record_oracle import record_oracle
from parity.trace import Trace
from parity.zoo import make_checkpoint, prompts
from parity.zoo.adapters import make_adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapted")
    base = make_checkpoint("qwen3", root / "base", num_hidden_layers=2)
    return base, make_adapter(base, root / "adapter", targets=("q_proj", "up_proj"))


@pytest.fixture(scope="module")
def traces(made):
    """By backend, and whether with the adapter."""
    from loaders import open_checkpoint

    base, adapter = made
    inputs = prompts(open_checkpoint(base).config, rows=2)
    found = {
        (name, with_it): record(base, open_backend(name), inputs, adapter=adapter if with_it else None)
        for name in ("jax", "torch")
        for with_it in (False, True)
    }
    for with_it in (False, True):
        given = {"adapter": adapter if with_it else None, "probes": 0}
        found["oracle", with_it] = record_oracle(open_checkpoint(base), inputs, **given)
    return found


@pytest.mark.parametrize(
    "with_it", [(True, False, False), (False, True, False), (True, True, False), (False, False, True)]
)
def test_runs_of_which_only_some_had_an_adapter_are_not_compared(traces, with_it):
    a, b, oracle = (traces[name, given] for name, given in zip(("jax", "torch", "oracle"), with_it, strict=True))
    comparison = compare(a, b, oracle)
    assert comparison.verdict == "INVALID"
    assert "adapter" in " ".join(comparison.reasons)


@pytest.mark.parametrize("with_it", [False, True])
def test_runs_that_all_had_it_or_none_are(traces, with_it):
    assert compare(*(traces[name, with_it] for name in ("jax", "torch", "oracle"))).verdict == "PASS"


def wrong(trace: Trace, name: str = "logits") -> Trace:
    return Trace({**trace.tensors, name: trace.tensors[name] * np.float32(1.5)}, trace.meta)


def test_the_command_of_a_failure_has_the_adapter(made, traces):
    base, adapter = made
    a, b, oracle = (traces[name, True] for name in ("jax", "torch", "oracle"))
    (command,) = compare(a, wrong(b, "hidden_states.1"), oracle).commands
    words = shlex.split(command)
    assert words[:3] == ["tandem", "bisect", str(base)]
    assert words[words.index("--adapter") + 1] == str(adapter)
    (command,) = compare(traces["jax", False], wrong(traces["torch", False]), traces["oracle", False]).commands
    assert "--adapter" not in command
    merged = Trace(wrong(b).tensors, {name: value for name, value in b.meta.items() if name != "adapter"})
    assert compare(a, merged, oracle).commands == ()


def test_of_a_wrong_draft_there_is_no_command_that_would_look_elsewhere(traces):
    a, b, oracle = (traces[name, False] for name in ("jax", "torch", "oracle"))
    drafts = {"mtp.logits": a.tensors["logits"][:, 1:], "mtp.hidden_state": a.tensors["final_hidden_state"][:, 1:]}
    a, b, oracle = (Trace({**trace.tensors, **drafts}, trace.meta) for trace in (a, b, oracle))
    failed = compare(a, wrong(b, "mtp.logits"), oracle)
    assert failed.verdict == "FAIL"
    assert failed.commands == ()


def test_an_assertion_says_how_to_run_it_again_only_where_that_is_the_same_run(made, monkeypatch):
    base, adapter = made
    sides = [ModelBackend(open_backend(name).load(base), open_backend(name)) for name in ("jax", "torch")]
    monkeypatch.setattr("parity.asserting.tell", lambda held: "")
    _, plain = hold(*sides, is_asserted=False)
    assert plain == f"tandem run {base} --a jax --b torch --dtype float32"
    _, other = hold(*sides, inputs={"input_ids": np.array([[3, 14, 15]])}, is_asserted=False)
    assert other == "Trace.save both, then: tandem compare a.trace b.trace --oracle oracle.trace"
    adapted = [ModelBackend(side.model.attach_lora(adapter), side.framework) for side in sides]
    _, other = hold(*adapted, is_asserted=False)
    assert other.startswith("Trace.save both")


def test_an_oracle_that_rounds_as_the_others_do_is_none(traces):
    found = compare(traces["jax", False], traces["torch", False], traces["torch", False])
    assert (found.verdict, found.exit_code) == ("INVALID", 3)
    (told,) = found.reasons
    assert told.startswith("the oracle (torch) computed in float32, expected float64: its own roundings would be taken")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["record", "{base}x", "--backend", "oracle", "--reload", "{base}"], "cannot be opened"),
        (["record", "{base}", "--backend", "oracle", "--reload", "{other}"], "as it is live"),
        (["record", "{base}", "--backend", "oracle", "--like", "{trace}"], "has no experts, so there is no choice"),
        (["record", "{other}", "--backend", "oracle", "--like", "{trace}"], "names no experts, so there is no choice"),
        (["record", "{base}", "--backend", "oracle", "--weight-only"], "is not quantised, so there is nothing to"),
        (["record", "{base}", "--backend", "jax", "--device", "cpu:-1"], "jax has no device 'cpu:-1'"),
        (["record", "{base}", "--backend", "jax", "--device", "cpu:x"], "jax has no device 'cpu:x'"),
        (["record", "{base}", "--backend", "jax", "--device", ":0"], "jax has no device ':0'"),
        (["weights", "{base}", "{base}", "--device", "cpu"], "--device: neither is loaded"),
        (["bisect", "{base}", "--layer", "1", "--everywhere"], "not allowed with argument"),
    ],
)
def test_options_that_would_be_ignored_are_refused(made, traces, tmp_path, capsys, options, told):
    other = make_checkpoint("qwen3-moe", tmp_path / "other", num_hidden_layers=1)
    traces["torch", False].save(tmp_path / "trace")
    places = {"base": made[0], "other": other, "trace": tmp_path / "trace"}
    words = [word.format(**places) for word in options]
    words += ["-o", str(tmp_path / "out")] if words[0] == "record" else []
    assert main(words) in (2, 5)
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_lies_wherever_its_path_says(made, tmp_path, capsys):
    base, _ = made
    odd = make_adapter(base, tmp_path / "a=b" / "c=d")
    ids = ["--prompt-ids", "3,14"]
    for given in (str(odd), f"name={odd}"):
        assert main(["generate", str(base), "--backend", "torch", *ids, "--adapter", given]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("kind", [bool, np.float32])
def test_a_mask_is_what_it_says_whatever_its_dtype(made, tmp_path, kind):
    base, _ = made
    mask = np.array([[1, 1, 1, 1], [0, 1, 1, 1]])
    ids = {"input_ids": np.array([[3, 14, 15, 92], [0, 65, 35, 89]])}
    for name, array in (("plain", mask), ("odd", mask.astype(kind))):
        save_file(ids | {"attention_mask": array}, tmp_path / name)
        for backend in ("torch", "oracle"):
            words = ["record", str(base), "--backend", backend, "--inputs", f"{tmp_path}/{name}"]
            assert main([*words, "-o", f"{tmp_path}/{name}.{backend}"]) == 0
    for backend in ("torch", "oracle"):
        plain, odd = (load_file(f"{tmp_path}/{name}.{backend}") for name in ("plain", "odd"))
        assert np.array_equal(plain["attention_mask"], odd["attention_mask"])
        assert np.array_equal(plain["logits"], odd["logits"])
