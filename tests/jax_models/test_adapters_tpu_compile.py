"""Adapters compiled for TPUs that are not there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu-compiler]'")
def test_an_adapter_of_an_embedding_is_read_where_it_lies(tmp_path: Path) -> None:
    """Of 152 thousand rows those of the tokens: a slot's table alone is 78 MB on a TPU, and 311 if it is whole."""
    result = tmp_path / "found.json"
    script = [sys.executable, str(ROOT / "tests" / "jax_models" / "compile_adapters.py"), "v5e", str(result)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(result.read_text("utf-8"))
    assert found["added"] < 1_000_000
    assert found["brought"] < 1_000_000
