"""Two real processes on loopback are one model: same bits, half the bytes each, and an error of one is of both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jax_models
from jax_models.processes import processes_of, to_host, together
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint, prompts
from parity.zoo_adapters import make_adapter

TIMEOUT_S = 900  # of a process, on a machine that does something else too
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


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_two(job: dict, directory: Path) -> list[dict]:
    program = Path(__file__).with_name("one_process.py")
    (directory / "job.json").write_text(json.dumps(job))
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, str(program), str(directory / "job.json")]
    logs = [open(directory / f"log{index}", "w+") for index in range(2)]  # noqa: SIM115 - closed below
    children = [
        subprocess.Popen([*command, str(index)], env=environment, stdout=logs[index], stderr=logs[index])
        for index in range(2)
    ]
    try:
        codes = [child.wait(TIMEOUT_S) for child in children]
    finally:
        for child, log in zip(children, logs, strict=True):
            child.kill()
            child.wait()
            log.close()
    assert codes == [0, 0], "\n".join((directory / f"log{index}").read_text()[-4000:] for index in range(2))
    return [json.loads((directory / f"found{index}.json").read_text()) for index in range(2)]


def error(found, expected) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_model(case, tmp_path):
    name, sizes, axes, options, most = CASES[case]
    paths = [make_checkpoint(name, tmp_path / f"checkpoint{seed}", seed=seed, **sizes) for seed in range(2)]
    bad = make_checkpoint(name, tmp_path / "bad", **sizes | {"num_hidden_layers": 3})
    adapter = None if "quantization" in sizes else make_adapter(paths[0], tmp_path / "adapter")
    models = [jax_models.load(path, **options) for path in paths]
    inputs = prompts(models[0].config, rows=4, tokens=24)
    models[0].save(tmp_path / "one")
    job = {
        "port": free_port(),
        "directory": str(tmp_path),
        "checkpoints": [str(path) for path in paths],
        "bad": str(bad),
        "adapter": adapter and str(adapter),
        "saved by one": str(tmp_path / "one"),
        "axes": list(axes),
        "sizes": list(axes.values()),
        "inputs": {key: value.tolist() for key, value in inputs.items()},
        "options": options,
    }
    both = run_two(job, tmp_path)
    real = inputs["attention_mask"].astype(bool)
    tokens = np.asarray(models[0].generate(**inputs, max_new_tokens=4, ignore_eos=True)).tolist()
    digests = [model.digests() for model in models]
    for found in both:
        assert found["loaded"]
        assert found["reloaded"]
        assert 0.4 < found["share"] <= most
        assert 0.4 < found["reloaded share"] <= most
        assert [found["digests"], found["changed digests"]] == digests
        assert found["tokens"] == tokens
        assert found["swapped"]
        assert found["restored"]
        assert found["restored from one"]
        assert found["still serving"]
        assert found["donated"]
        assert "FileExistsError" in found["export again"]
        assert "num_hidden_layers is 3, expected " in found["bad on one"]
        assert "ZeroDivisionError" in found["failed on one"]
        assert adapter is None or found["detached"]
    assert both[0]["sampled"] == both[1]["sampled"]
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
