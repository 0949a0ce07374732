"""What one process of a mesh does wrong, or otherwise than the others, is an error of all, and nothing changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted import TWO_LAYERS
from several import free_port, run_several

import jax_models
from loaders import open_checkpoint
from parity.zoo import block_sizes, make_checkpoint, prompts
from parity.zoo.adapters import make_adapter
from parity.zoo.draft import make_drafting_checkpoint

SIZES = {"vocab_size": 208, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
PROGRAMS = {"jax": "jax_models/one_sided_process.py", "torch": "torch_models/one_sided_rank.py"}
DIFFERENT = "is not the same on all"
ALONE = "RuntimeError: 1 of 2 "
# of load, what each of two is given
OPTIONS = {
    "a dtype": [{}, {"dtype": "float16"}],
    "a stage": [{}, {"stage": [2, 2]}],
    "activations": [{}, {"activation_quantization": True}],
    "a method": [{}, {"quantize": "int4"}],
    "a budget": [{}, {"host_budget_bytes": -1}],
}
KERNELS = {
    "a kernel": [{"quantize": "nvfp4"}, {"quantize": "nvfp4", "kernel": "triton"}],
    "an order of scales": [{"quantize": "nvfp4"}, {"quantize": "nvfp4", "kernel": "reference-128x4"}],
}
# what the first of them says, which did nothing wrong
SAID = {
    **dict.fromkeys(OPTIONS, ALONE),
    "a kernel": ALONE,
    "an order of scales": DIFFERENT,
    "axis": ALONE,
    "other axes": DIFFERENT,
    "other config": DIFFERENT,
    "other dtype": DIFFERENT,
    "other weights": DIFFERENT,
    "a short embedding": ALONE,
    "another embedding": DIFFERENT,
    "half of it": DIFFERENT,
    "no adapter": ALONE,
    "a name that is no UTF-8": ALONE,
    "another adapter": DIFFERENT,
    "another name": DIFFERENT,
    "detach": ALONE,
    "merge": ALONE,
    "replace": ALONE,
    "a seed": DIFFERENT,
    "a token": ALONE,
    "other room": DIFFERENT,
    "other rows": DIFFERENT,
    "another prompt": DIFFERENT,
    "an end": DIFFERENT,
    "rows of a call": DIFFERENT,
    "a level": DIFFERENT,
    "what goes in": DIFFERENT,
    "other models": DIFFERENT,
    "other checkpoints": DIFFERENT,
    "other saves": DIFFERENT,
    "other names of adapters": DIFFERENT,
    "other weights by hand": DIFFERENT,
    "other shared halves": DIFFERENT,
    "a draft of others": DIFFERENT,
    "other models updated": DIFFERENT,
    "other models swapped": DIFFERENT,
    "other models replaced": DIFFERENT,
    "other models adapted": DIFFERENT,
    "another function": DIFFERENT,
    "asleep or awake": DIFFERENT,
    "graphs": DIFFERENT,
    "no cache": ALONE,
    "not merged": ALONE,
    "merged": ALONE,
    "restored to other axes": DIFFERENT,
    "other models in steps": DIFFERENT,
    "other models saved": DIFFERENT,
    "other models exported": DIFFERENT,
    "other models read": DIFFERENT,
    "the last of many tokens": DIFFERENT,
    "another token": DIFFERENT,
    "another cache": DIFFERENT,
    "another history": DIFFERENT,
    "other values": DIFFERENT,
    "other hidden states": DIFFERENT,
    "other pixels": DIFFERENT,
    "other shared states": DIFFERENT,
    "fewer pixels": ALONE,
    "a draft": DIFFERENT,
    "rows of a draft": DIFFERENT,
    "what a draft says": DIFFERENT,
    "another save": DIFFERENT,
    "no save": ALONE,
    "whether it is verified": DIFFERENT,
    "restored to an axis": ALONE,
    "devices in another order": DIFFERENT,
    "other devices": DIFFERENT,
    "saved nowhere": ALONE,
    "what is given up": DIFFERENT,
    "no graphs": ALONE,
    "kept beside": ALONE,
}
# what torch does not have; and what its ranks are not asked about: one that fails tells those that wait for it
ONLY_JAX = {"axis", "replace", "another save", "no save", "whether it is verified", "restored to an axis"}
ONLY_JAX |= {
    "other shared states",
    "other names of adapters",
    "other weights by hand",
    "other shared halves",
    "other models replaced",
}
ONLY_TORCH = {
    "kept beside",
    "half of it",
    "other models adapted",
    "asleep or awake",
    "graphs",
    "no cache",
    "not merged",
    "merged",
    *KERNELS,
}
ONLY_JAX |= {
    "devices in another order",
    "other devices",
    "saved nowhere",
    "what is given up",
    "no graphs",
    "other models saved",
    "other saves",
    "restored to other axes",
}


@pytest.mark.parametrize("backend", PROGRAMS)
def test_what_one_process_does_alone_is_an_error_of_both(backend, tmp_path):
    checkpoints = [make_checkpoint("qwen3", tmp_path / str(seed), seed=seed, **SIZES) for seed in range(2)]
    inputs = prompts(open_checkpoint(checkpoints[0]).config, rows=2, tokens=16)
    job = {
        "port": free_port(),
        "checkpoints": [str(path) for path in checkpoints],
        "other": str(make_checkpoint("qwen3", tmp_path / "other", rms_norm_eps=0.5, **SIZES)),
        "tied": str(make_checkpoint("qwen3-tied", tmp_path / "tied", **SIZES)),
        "aligned": str(make_checkpoint("qwen3", tmp_path / "aligned", **block_sizes("qwen3"))),
        "options": OPTIONS,
        "kernels": KERNELS,
        "adapters": [str(make_adapter(checkpoints[0], tmp_path / f"adapter{seed}", seed=seed)) for seed in range(2)],
        "seeing": str(make_checkpoint("qwen3_vl", tmp_path / "seeing")),
        "drafting": str(make_drafting_checkpoint("qwen3_5", tmp_path / "drafting", **TWO_LAYERS)),
        "inputs": {key: value.tolist() for key, value in inputs.items()},
    }
    if backend == "jax":
        for seed, path in enumerate(checkpoints):
            jax_models.load(path).save(tmp_path / f"saved by one {seed}")
        job["saves"] = [str(tmp_path / f"saved by one {seed}") for seed in range(2)]
    program = Path(__file__).parents[1] / PROGRAMS[backend]
    both = run_several(program, job, tmp_path, 2, {"JAX_NUM_CPU_DEVICES": "2"})
    for what in both[0].keys() & SAID.keys():
        assert SAID[what] in both[0][what], what
        assert both[1][what], what
        assert ALONE not in both[1][what], what  # it says itself what was wrong
    assert [found["serving"] for found in both] == [True, True]
    if backend == "jax":
        assert both[0].keys() >= SAID.keys() - ONLY_TORCH
        assert [found["interrupted"] for found in both] == [
            "RuntimeError: process 1 gave up: KeyboardInterrupt",
            "interrupted",
        ]
        assert "RuntimeError: processes [1] of [0, 1] did not come within 1 s. Did it" in both[0]["late"]
        assert both[1]["late"] == "RuntimeError: process 0 gave up: RuntimeError"
        assert "expected some of this one, 1" in both[1]["elsewhere"]
        assert all("max_new_tokens" in found["an option"] for found in both)
        assert all(found["not a number"] == "none" for found in both)
        assert all("FloatingPointError" in found["no tokens"] for found in both)
        assert all(max(found["handed on"]) < 1e-4 for found in both)
        assert all(found["tied"] and found["tied arrays"] for found in both)
        assert all("must be the embedding or equal" in found["untied"] for found in both)
    else:
        assert both[0].keys() >= SAID.keys() - ONLY_JAX
