"""Stages of a pipeline are saved and restored by the processes of their own meshes, whatever the others do."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest
from several import free_port, run_several

import jax_models
from loaders import CheckpointError
from parity.zoo import make_checkpoint

PROGRAM = Path(__file__).with_name("stage_processes.py")
SIZES = {"vocab_size": 208, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
AT_ONCE_S = 30  # Orbax's barriers would take 300


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return make_checkpoint("qwen3", tmp_path / "checkpoint", **SIZES)


@pytest.mark.slow
def test_each_stage_is_saved_by_its_own_processes_and_what_one_cannot_do_none_does(checkpoint, tmp_path):
    job = {"port": free_port(), "checkpoint": str(checkpoint)}
    found = run_several(PROGRAM, job, tmp_path, 3, {"JAX_NUM_CPU_DEVICES": "2"})
    expected = [jax_models.load(checkpoint, stage=(index, 2)).digests() for index in range(2)]
    assert [one["digests"] for one in found] == [expected[0], expected[1], expected[1]]
    assert all(one["restored"] for one in found)
    assert found[0]["elsewhere"] == expected[1]
    assert "ValueError: the mesh has devices of processes [1, 2], expected some of this one, 0" in found[0]["not ours"]
    for index in range(2):  # on one device, here
        restored = jax_models.restore(tmp_path / f"stage{index}")
        assert restored.digests() == expected[index]
        assert {len(leaf.devices()) for leaf in jax.tree.leaves(restored.weights)} == {1}
    assert jax_models.restore(tmp_path / "alone").digests() == jax_models.load(checkpoint).digests()
    written = [{name for name in one["files"] if name.startswith("ocdbt.process_")} for one in found]
    assert written == [{"ocdbt.process_0"}, *[{"ocdbt.process_1", "ocdbt.process_2"}] * 2]  # each its own part
    raised = {
        "no directory": ("NotADirectoryError: ", 1),
        "full disk": ("File too large", 2),
        "apart": ("FileNotFoundError: ", 2),
        "there": ("FileExistsError: ", 1),
    }
    for what, (text, culprit) in raised.items():
        for process in (1, 2):
            assert text in found[process][what]["error"]
            is_told = found[process][what]["error"].startswith("RuntimeError: 1 of 2 processes failed, so none goes on")
            assert is_told == (process != culprit)
            assert found[process][what]["seconds"] < AT_ONCE_S
    assert found[1]["left"] == found[2]["left"] == []
    assert [one["saved at last"] for one in found[1:]] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "after"), [(2, "save"), (1, "finalize")])
def test_a_process_killed_while_its_stage_is_saved_costs_nothing_that_was_saved(killed, after, checkpoint, tmp_path):
    job = {"port": free_port(), "checkpoint": str(checkpoint), "killed": killed, "after": after}
    with pytest.raises(AssertionError):  # it has no answer
        run_several(PROGRAM, job, tmp_path, 3, {"JAX_NUM_CPU_DEVICES": "2"})
    other = json.loads((tmp_path / f"found{3 - killed}.json").read_text())
    assert other["error"] != "none"
    assert other["seconds"] < AT_ONCE_S
    for index in range(2):
        expected = jax_models.load(checkpoint, stage=(index, 2)).digests()
        assert jax_models.restore(tmp_path / f"stage{index}").digests() == expected
    if killed != 1:  # the stage's first process lives, and takes away what was begun
        assert list(tmp_path.glob("cut*")) == []
        return
    assert [path.name for path in tmp_path.glob("cut*")] == ["cut.orbax-checkpoint-tmp"]
    with pytest.raises(CheckpointError, match="no complete save"):
        jax_models.restore(tmp_path / "cut.orbax-checkpoint-tmp")
