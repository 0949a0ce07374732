"""Every family compiles for every generation of TPU, with no TPU: a few layers of sizes that tiles allow."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity.planning.environment import deep_stack
from parity.planning.meshes import PROGRAMS
from parity.zoo.models import ZOO, zoo_config

ROOT = Path(__file__).parents[2]
CHIPS = ["v5e", "v6e", "tpu7x"]
FAMILIES = ["qwen3", "qwen3-moe", "qwen3_5", "qwen3_5-moe", "qwen3_vl", "qwen3_vl-moe", "gemma3"]
QUANTISED = ["qwen3-nvfp4", "qwen3-moe-nvfp4", "qwen3-nvfp4-float32", "qwen3-moe-nvfp4-float32"]
# what is set around a model changes nothing: kernels compile for neither of these
AROUND = {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_ENABLE_X64": "true", "JAX_NUMPY_RANK_PROMOTION": "raise"}
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "query_pre_attn_scalar": 128,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install '.[tpu-compiler]'"
    ),
]


@pytest.fixture(scope="module", params=[(chip, name) for chip in CHIPS for name in FAMILIES + QUANTISED], ids="-".join)
def compiled(request, tmp_path_factory):
    """What compile_families.py found, in a process of its own: libtpu cannot be unloaded, and may crash."""
    chip, name = request.param
    zoo = name.removesuffix("-float32").removesuffix("-nvfp4")
    sizes = {key: size for key, size in SIZES.items() if key in ZOO[zoo].config}
    if "layer_types" not in ZOO[zoo].config:  # all alike, but for a dense one among experts
        sizes["num_hidden_layers"] = 2
    config = tmp_path_factory.mktemp("families") / f"{name}.json"
    config.write_text(json.dumps(zoo_config(zoo, dtype="BF16", **sizes)), encoding="utf-8")
    result = config.with_suffix(".found")
    script = [
        sys.executable,
        str(ROOT / "tests" / "jax_models" / "compile_families.py"),
        chip,
        str(result),
        str(config),
    ]
    environment = os.environ | AROUND | {"PYTHONPATH": str(ROOT)}
    with deep_stack():
        done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {program.removeprefix(f"{name} "): found for program, found in json.loads(result.read_text("utf-8")).items()}


def test_it_compiles_and_updates_its_cache_in_place(compiled):
    for program in ("prefill", "decode"):
        found = compiled[program]
        assert "out_of_memory_bytes" not in found
        assert found["unknown_loops"] == []
        assert abs(found["alias_bytes"] - found["cache_bytes"]) < 2**16


def test_prompts_and_steps_attend_by_a_kernel_each(compiled, request):
    """In every layer that attends: of four of a hybrid one, of others both; Gemma also in windows. No float32 does."""
    found = {program: (compiled[program]["splash"], compiled[program]["attend_held"]) for program in PROGRAMS}
    if "float32" in request.node.callspec.id:
        assert set(found.values()) == {(0, 0)}
        return
    prompts, steps = found["prefill"][0], found["decode"][1]
    assert prompts == steps >= 1
    assert found == {"prefill": (prompts, 0), "decode": (0, steps)}


def test_a_prompt_with_images_compiles(compiled, request):
    sees = "qwen3_vl" in request.node.callspec.id
    assert compiled.get("images") is (True if sees else None)
