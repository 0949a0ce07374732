"""Every verb that runs a backend, in this process: what it writes, what it prints, and its exit code."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loaders import open_checkpoint
from loaders.digest import digests
from parity.cli import main
from parity.trace import Trace
from parity.zoo import make_checkpoint, prompts


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("verbs")
    sizes = {"num_hidden_layers": 2, "vocab_size": 97}
    return [
        make_checkpoint("qwen3-moe", root / str(seed), seed=seed, max_file_bytes=40_000, **sizes) for seed in (0, 1)
    ]


def test_run_says_rounding_and_writes_every_report(checkpoints, tmp_path, capsys):
    reports = [f"--{kind}={tmp_path / kind}" for kind in ("html", "json", "junit", "md")]
    assert main(["run", str(checkpoints[0]), "--max-new-tokens", "3", *reports]) == 0
    assert "agree to within rounding" in capsys.readouterr().out
    assert json.loads((tmp_path / "json").read_text())
    assert all((tmp_path / kind).stat().st_size for kind in ("html", "junit", "md"))


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_record_writes_the_trace_of_the_design_on_the_inputs_given(backend, checkpoints, tmp_path):
    config = open_checkpoint(checkpoints[0]).config
    inputs = prompts(config, rows=2, tokens=24, padding="left")
    save_file(inputs, tmp_path / "inputs.safetensors")
    given = ["--inputs", str(tmp_path / "inputs.safetensors"), "--max-new-tokens", "3", "--ignore-eos"]
    target = tmp_path / "trace.safetensors"
    assert main(["record", str(checkpoints[0]), "--backend", backend, *given, "-o", str(target)]) == 0
    trace = Trace.load(target)
    D, V = config.hidden_size, config.vocab_size
    shapes = {name: trace.tensors[name].shape for name in trace.tensors}
    assert shapes["logits"] == (2, 24, V)
    assert shapes["generated_ids"] == (2, 3)
    for name in ("hidden_states.0", "hidden_states.1", "hidden_states.2", "final_hidden_state"):
        assert shapes[name] == (2, 24, D)
    assert all(trace.tensors[name].dtype == np.float32 for name in shapes if shapes[name] == (2, 24, D))
    assert (trace.tensors["input_ids"] == inputs["input_ids"]).all()


@pytest.mark.parametrize("options", [["--ignore-eos"], ["--max-new-tokens", "0"], ["--max-new-tokens", "-1"]])
def test_nothing_is_said_of_tokens_that_are_not_generated(options, checkpoints, tmp_path, capsys):
    for verb in (["record", "--backend", "torch", "-o", str(tmp_path / "t")], ["run"]):
        assert main([verb[0], str(checkpoints[0]), *verb[1:], *options]) == 2
        assert "max_new_tokens" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("offset", [0, 7])
def test_what_is_generated_goes_with_the_positions_that_are_given_or_nothing_is(offset, checkpoints, tmp_path, capsys):
    inputs = prompts(open_checkpoint(checkpoints[0]).config, rows=2, tokens=16, padding="left")
    counted = np.maximum(np.cumsum(inputs["attention_mask"], axis=1) - 1, 0)
    save_file(inputs | {"position_ids": counted + offset}, tmp_path / "inputs.safetensors")
    for count in (3, 5):
        given = ["--inputs", str(tmp_path / "inputs.safetensors"), "--max-new-tokens", str(count), "--ignore-eos"]
        given += ["--backend", "torch", "-o", str(tmp_path / f"{count}.trace")]
        assert main(["record", str(checkpoints[0]), *given]) == (2 if offset else 0)
        assert ("position_ids are given, and generation counts others" in capsys.readouterr().err) is bool(offset)
    if not offset:
        assert Trace.load(tmp_path / "5.trace").meta["max_new_tokens"] == 5
        assert main(["compare", str(tmp_path / "3.trace"), str(tmp_path / "5.trace")]) == 0


def test_a_trace_recorded_after_a_reload_has_the_weights_of_the_second_checkpoint(checkpoints, tmp_path):
    first, second = map(str, checkpoints)
    target = tmp_path / "t"
    assert main(["record", first, "--backend", "torch", "--reload", second, "-o", str(target)]) == 0
    meta = Trace.load(target).meta
    assert meta["weights"]["digests"] == digests(open_checkpoint(second).stream())
    assert [event["kind"] for event in meta["events"]] == ["load", "reload"]


def test_the_oracle_is_a_backend_that_replays_routing_and_refuses_options_it_cannot_have(checkpoints, tmp_path, capsys):
    ours, oracle = tmp_path / "ours", tmp_path / "oracle"
    assert main(["record", str(checkpoints[0]), "--backend", "torch", "-o", str(ours)]) == 0
    recorded = ["record", str(checkpoints[0]), "--backend", "oracle", "--like", str(ours), "-o", str(oracle)]
    assert main(recorded) == 0
    assert main(["compare", str(ours), str(ours), "--oracle", str(oracle), "-q"]) == 0
    assert main([*recorded, "--dtype", "bfloat16"]) == 2
    assert "--dtype" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_export_after_a_reload_gives_the_second_checkpoints_tensors_back(backend, checkpoints, tmp_path):
    first, second = map(str, checkpoints)
    target = tmp_path / "exported"
    assert main(["export", first, "--backend", backend, "--reload", second, "-o", str(target)]) == 0
    files = {file.name: load_file(file) for file in target.glob("*.safetensors")}
    assert {name: sorted(tensors) for name, tensors in files.items()} == {
        file.name: sorted(load_file(file)) for file in checkpoints[1].glob("*.safetensors")
    }
    assert digests(open_checkpoint(target).stream()) == digests(open_checkpoint(second).stream())


def test_both_backends_generate_the_same_tokens_for_a_ragged_batch(checkpoints, capsys):
    prompt = ["--prompt-ids", "3,14,15", "--prompt-ids", "92,65", "--max-new-tokens", "4", "--ignore-eos"]
    said = []
    for backend in ("jax", "torch"):
        assert main(["generate", str(checkpoints[0]), "--backend", backend, *prompt]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert [len(row.split(",")) for row in said[0].split()] == [4, 4]


def test_inspect_counts_every_tensor_once_over_the_stages_and_divides_bytes_over_devices(checkpoints, capsys):
    opened = open_checkpoint(checkpoints[0])
    assert main(["inspect", str(checkpoints[0]), "--stages", "2", "--expert", "5", "--tensor", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(stage["tensors_loaded"] for stage in found["stages"]) == len(opened.tensors) == found["tensors"]
    assert sum(stage["bytes"] for stage in found["stages"]) == opened.num_bytes == found["bytes"]
    assert all(stage["bytes_per_device"] < stage["bytes"] for stage in found["stages"])
    assert main(["inspect", str(checkpoints[0])]) == 0
    assert "Qwen3MoeForCausalLM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["run", "nowhere"], 2),
        (["record", "CKPT", "--backend", "torch", "--device", "cuda:99", "-o", "x"], 5),
        (["record", "CKPT", "--backend", "jax", "--device", "no-such-platform", "-o", "x"], 5),
        (["record", "CKPT", "--backend", "torch", "--like", "x", "-o", "x"], 2),
        (["generate", "CKPT", "--prompt-ids", "100000"], 2),
        (["generate", "CKPT", "--prompt-ids", "1", "--top-p", "7"], 2),
    ],
)
def test_bad_input_is_two_and_a_missing_device_is_five(arguments, code, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(checkpoints[0]) if word == "CKPT" else word for word in arguments]) == code
    assert capsys.readouterr().err.startswith("tandem ")


@pytest.mark.parametrize(
    ("verb", "option", "output", "words"),
    [
        ("export --backend torch", "-o", "s3://b/out", "nothing is written to s3://"),
        ("quantize", "-o", "gs://b/out", "nothing is written to gs://"),
        ("export --backend jax", "-o", ".", "is not empty"),
        ("record --backend torch", "-o", "s3://b/out", "nothing is written to s3://"),
        ("record --backend oracle", "-o", "none/t", "make it first"),
        ("run", "--html", "none/page.html", "make it first"),
        ("run", "--junit", ".", "is a directory, expected a file"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(
    verb, option, output, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").touch()
    name, *rest = verb.split()
    assert main([name, "no-checkpoint", *rest, option, output]) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
