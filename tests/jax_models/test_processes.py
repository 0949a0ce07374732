"""Two real processes on loopback are one model: same bits, half the bytes each, and an error of one is of both."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from one_process import LARGE
from several import error, free_port, run_several

import jax_models
from jax_models.orbax_files import write
from jax_models.processes import processes_of, to_host, together
from loaders import open_checkpoint
from loaders.checkpoint import NUM_SAMPLES, SAMPLE_BYTES
from loaders.host.multimodal import check_inputs
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint, prompts
from parity.zoo.adapters import make_adapter
from parity.zoo.pictures import pictures

FINGERPRINT_BYTES = NUM_SAMPLES * SAMPLE_BYTES
PROGRAM = Path(__file__).with_name("one_process.py")
EVEN = {"vocab_size": 208, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
EVEN_MOE = EVEN | {"num_experts": 8, "moe_intermediate_size": 24}
# name -> zoo model, its sizes, axes and sizes of the mesh, options of load, most of the checkpoint that each may read
CASES = {
    "experts apart": ("qwen3-moe", EVEN_MOE, {"expert": 4}, {}, 0.55),
    "columns apart": ("qwen3", EVEN, {"tensor": 4}, {}, 0.52),
    "nvfp4": (
        "qwen3",
        block_sizes("qwen3") | {"quantization": ZooQuantization(), "vocab_size": 208},
        {"tensor": 4},
        {},
        0.75,
    ),
    "rows of a batch apart": ("qwen3", EVEN, {"data": 2, "tensor": 2}, {}, 1.0),  # both hold everything
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_model(case, tmp_path):
    name, sizes, axes, options, most = CASES[case]
    paths = [make_checkpoint(name, tmp_path / f"checkpoint{seed}", seed=seed, **sizes) for seed in range(2)]
    bad = make_checkpoint(name, tmp_path / "bad", **sizes | {"num_hidden_layers": 3})
    adapter = None if "quantization" in sizes else make_adapter(paths[0], tmp_path / "adapter")
    models = [jax_models.load(path, **options) for path in paths]
    most += FINGERPRINT_BYTES / models[0].checkpoint.num_bytes
    inputs = prompts(models[0].config, rows=4, tokens=24)
    models[0].save(tmp_path / "one")
    largest = max(array.nbytes for array in jax.tree.leaves(models[0].weights))
    for one, (shape, _) in LARGE.items():
        array = jax.random.normal(jax.random.key(0), shape)
        write(str(tmp_path / "large" / one), None, {one: array}, {}, stacks=["stack"])
    shutil.copytree(tmp_path / "one", tmp_path / "bad save")
    shutil.rmtree(tmp_path / "bad save" / "weights")
    job = {
        "port": free_port(),
        "checkpoints": [str(path) for path in paths],
        "bad": str(bad),
        "adapter": adapter and str(adapter),
        "saved by one": str(tmp_path / "one"),
        "large": str(tmp_path / "large"),
        "bad save": str(tmp_path / "bad save"),
        "axes": list(axes),
        "sizes": list(axes.values()),
        "inputs": {key: value.tolist() for key, value in inputs.items()},
        "options": options,
        "budget": largest * 3 // 4 if most < 1 else largest,  # of half a parameter, where each has that
    }
    both = run_several(PROGRAM, job, tmp_path, 2, {"JAX_NUM_CPU_DEVICES": "2"})
    real = inputs["attention_mask"].astype(bool)
    tokens = np.asarray(models[0].generate(**inputs, max_new_tokens=4, ignore_eos=True)).tolist()
    digests = [model.digests() for model in models]
    for found in both:
        assert found["loaded"]
        assert found["reloaded"]
        assert found["within half"]
        assert 0.4 < found["share"] <= most
        assert 0.4 < found["reloaded share"] <= most
        assert [found["digests"], found["changed digests"]] == digests
        assert found["tokens"] == tokens
        assert found["swapped"]
        assert found["swapped by an array"]
        assert found["restored"]
        assert found["restored from one"]
        assert max(found["large"].values()) < 0.55, found["large"]
        assert found["still serving"]
        assert found["donated"]
        assert "its arrays cannot be read" in found["bad save on one"]
        assert "there is nothing there, expected a directory that save wrote" in found["lost save on one"]
        assert found["donated in vain"].startswith("RuntimeError: ")
        assert "parameters were given up already on one of 2 processes. Update again" in found["donated in vain"]
        assert "the disk is gone" in found["donated in vain"]
        assert "were given up to an update" in found["in vain"]
        assert found["updated again"]
        assert "FileExistsError" in found["export again"]
        assert "num_hidden_layers is 3, expected " in found["bad on one"]
        assert "ZeroDivisionError" in found["failed on one"]
        assert adapter is None or found["detached"]
    assert both[0]["sampled"] == both[1]["sampled"]
    for what in ("bad save on one", "lost save on one"):
        assert both[0][what].startswith("RuntimeError: 1 of 2 processes failed, so none goes on. process 1: Check")
    assert both[0]["bad on one"].startswith("RuntimeError: 1 of 2 processes failed, so none goes on. process 1: Check")
    with np.load(tmp_path / "logits.npz") as logits:
        for key, model in zip(("logits", "changed"), models, strict=True):
            assert error(logits[key][real], np.asarray(model(**inputs))[real]) < 2e-6
        if adapter is not None:
            expected = np.asarray(models[0].attach_lora(adapter, "a")(**inputs))
            assert error(logits["adapted"][real], expected[real]) < 2e-6
    alone = models[1].export(tmp_path / "alone")
    assert {file.name: file.read_bytes() for file in alone.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()
    }
    assert jax_models.restore(tmp_path / "save").digests() == digests[1]


def test_one_process_asks_nobody():
    assert processes_of(None) == [0]
    assert together(None, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        together(None, lambda: 1 / 0)
    assert to_host(jax.numpy.arange(3)).tolist() == [0, 1, 2]


def test_a_prompt_is_known_by_its_tokens_and_by_what_it_shows(tmp_path):
    config = open_checkpoint(make_checkpoint("qwen3_vl", tmp_path / "it")).config
    shown = pictures(config, tokens=48)
    names = ("input_ids", "attention_mask", "position_ids")
    multimodal = {name: value for name, value in shown.items() if name not in names}

    def said(**changed):
        given = {name: shown.get(name) for name in names} | {
            name: changed.pop(name) for name in names if name in changed
        }
        return check_inputs(config, *given.values(), given=multimodal | changed, has_tower=True).digest

    assert said() == said()
    turned = np.where(shown["input_ids"] == shown["input_ids"][0, -1], 3, shown["input_ids"])
    assert len({said(), said(input_ids=turned), said(pixel_values=shown["pixel_values"] * 2)}) == 3
