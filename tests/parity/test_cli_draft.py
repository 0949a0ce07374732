"""The draft on the command line: generate --draft, record --mtp, run --mtp, inspect --mtp."""

import json

import numpy as np
import pytest
from planted import TWO_LAYERS

from parity.cli import main
from parity.trace import Trace
from parity.zoo import make_checkpoint
from parity.zoo.draft import make_drafting_checkpoint

PROMPT = ["--prompt-ids", "3,14,15", "--prompt-ids", "92,65", "--max-new-tokens", "12", "--ignore-eos"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(make_drafting_checkpoint("qwen3_5", tmp_path_factory.mktemp("cli") / "a", quiet=0.02, **TWO_LAYERS))


@pytest.mark.slow_unless("torch")
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_generate_with_the_draft_prints_the_same_tokens_and_what_the_draft_was_worth(backend, checkpoint, capsys):
    command = ["generate", checkpoint, "--backend", backend, *PROMPT]
    assert main(command) == 0
    plain = capsys.readouterr()
    assert main([*command, "--draft", "--draft-tokens", "2"]) == 0
    drafted = capsys.readouterr()
    assert drafted.out == plain.out
    assert plain.err == ""
    first, second = drafted.err.split(": ")
    length = float(first.removeprefix("acceptance length "))
    accepted, drafted_tokens, rounds = (int(word) for word in second.split() if word.isdigit())
    assert drafted_tokens == 2 * rounds
    assert length == round(1 + accepted / rounds, 2) > 1


def test_options_of_a_draft_without_one_are_errors(checkpoint, tmp_path, capsys):
    assert main(["generate", checkpoint, "--backend", "torch", *PROMPT, "--draft-tokens", "2"]) == 2
    assert "--draft-tokens goes with --draft" in capsys.readouterr().err
    plain = str(make_checkpoint("qwen3", tmp_path / "a", num_hidden_layers=1))
    assert main(["generate", plain, "--backend", "torch", *PROMPT, "--draft"]) == 2
    assert "a draft was asked for" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["jax", "torch", "oracle"])
def test_record_writes_what_the_draft_says(backend, checkpoint, tmp_path):
    target = tmp_path / "trace"
    assert main(["record", checkpoint, "--backend", backend, "--mtp", "-o", str(target)]) == 0
    tensors = Trace.load(target).tensors
    B, T, V = tensors["logits"].shape
    assert tensors["mtp.logits"].shape == (B, T - 1, V)
    assert tensors["mtp.hidden_state"].shape == (B, T - 1, tensors["final_hidden_state"].shape[-1])
    assert np.isfinite(tensors["mtp.logits"]).all()


def test_inspect_counts_the_draft(checkpoint, capsys):
    def inspected(*options):
        assert main(["inspect", checkpoint, "--json", "--stages", "2", *options]) == 0
        return json.loads(capsys.readouterr().out)["stages"]

    without, beside = inspected(), inspected("--mtp")
    assert without[0] == beside[0] | {"tensors_left_out": without[0]["tensors_left_out"]} | {
        "tensors_of_other_stages": without[0]["tensors_of_other_stages"]
    }
    left_out = [name for name in without[1]["tensors_left_out"] if name.startswith("mtp.")]
    assert left_out
    assert beside[1]["tensors_loaded"] == without[1]["tensors_loaded"] + len(left_out) + 1  # and the embedding
