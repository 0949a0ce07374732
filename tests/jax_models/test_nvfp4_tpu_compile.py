"""NVFP4 products of Qwen3-8B and of Qwen3-30B-A3B's experts, compiled for TPUs that are not there."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHIPS = ["v5e", "v6e", "tpu7x"]
SHAPES = ["decode-up", "decode-down", "prefill-up", "prefill-down", "experts-up", "experts-down"]
MEGABYTE = 10**6

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu-compiler]'"
    ),
]


@pytest.fixture(scope="module", params=CHIPS)
def measured(request, tmp_path_factory):
    """What benchmarks/tpu_nvfp4.py found for one chip, in a process of its own: libtpu cannot be unloaded."""
    result = tmp_path_factory.mktemp("tpu") / "found.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "tpu_nvfp4.py"), "--ways", "kernel"]
    options = ["--chips", request.param, "--json", str(result)]
    done = subprocess.run(script + options, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    return {row["shape"]: row for row in json.loads(result.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("shape", SHAPES)
def test_one_kernel_multiplies_and_no_expanded_weight_is_kept(measured, shape):
    row = measured[shape]
    assert row["custom_calls"] == 1
    assert row["wide_arrays"] == []
    assert row["temp_bytes"] < MEGABYTE


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "prefill" not in shape])
def test_a_decode_step_moves_codes_and_scales_once(measured, shape):
    row = measured[shape]
    # tpu7x's compiler brings all scales to VMEM ahead of the kernel, and counts them four times; HBM is read once
    assert row["bytes"] < (1.5 if row["chip"] == "tpu7x" else 1.05) * row["least_bytes"]
