"""Every example runs as its first lines say, without arguments and with a checkpoint of somebody's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity.zoo import make_checkpoint

EXAMPLES = sorted(Path(__file__).parents[1].glob("examples/*.py"))


def run(example: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(example.parents[1])}
    command = [sys.executable, str(example), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_it_says(example: Path) -> None:
    assert f"python examples/{example.name} [CHECKPOINT" in example.read_text(encoding="utf-8")
    assert run(example)


def test_an_example_takes_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("qwen3-moe", tmp_path / "checkpoint")
    [compare] = [example for example in EXAMPLES if example.stem == "compare"]
    assert "mlp.gate" in run(compare, str(checkpoint))
