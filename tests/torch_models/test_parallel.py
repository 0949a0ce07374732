"""Ranks of a mesh are one model: each holds its part of the weights, and all say what one device says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import torch_models
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint, prompts

TIMEOUT_S = 900  # of a rank, on a machine that does something else too
EVEN = {"vocab_size": 208, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
EVEN_VL = EVEN | {"num_hidden_layers": 4, "num_experts": 4}
# zoo model and its sizes, axes of the mesh, most of the weights that a rank may hold
CASES = {
    "qwen3": ("qwen3", EVEN, {"tensor": 2}, 0.52),
    "tied": ("qwen3-tied", EVEN, {"tensor": 2}, 0.52),
    "experts apart": ("qwen3-moe", EVEN | {"num_experts": 4}, {"expert": 2}, 0.55),
    "experts and width apart": ("qwen3-moe", EVEN | {"num_experts": 4}, {"expert": 2, "tensor": 2}, 0.3),
    "gemma3": ("gemma3", {"vocab_size": 208, "num_attention_heads": 4, "num_key_value_heads": 2}, {"tensor": 2}, 0.55),
    "a tower that is whole": ("qwen3_vl-moe", EVEN_VL, {"expert": 2}, 0.9),
    "nothing divides": (
        "qwen3",
        {"num_hidden_layers": 2, "intermediate_size": 55, "num_attention_heads": 9},
        {"tensor": 2},
        1.0,
    ),
}


def run_ranks(job: dict, directory: Path) -> list[dict]:
    program = Path(__file__).with_name("one_rank.py")
    (directory / "job.json").write_text(json.dumps(job))
    ranks = range(job["ranks"])
    logs = [open(directory / f"log{rank}", "w+") for rank in ranks]  # noqa: SIM115 - closed below
    command = [sys.executable, str(program), str(directory / "job.json")]
    children = [subprocess.Popen([*command, str(rank)], stdout=logs[rank], stderr=logs[rank]) for rank in ranks]
    try:
        codes = [child.wait(TIMEOUT_S) for child in children]
    finally:
        for child, log in zip(children, logs, strict=True):
            child.kill()
            child.wait()
            log.close()
    assert not any(codes), "\n".join((directory / f"log{rank}").read_text()[-3000:] for rank in ranks)
    return [json.loads((directory / f"found{rank}.json").read_text()) for rank in ranks]


def error(found, expected) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ranks_are_one_model(case, tmp_path):
    name, sizes, axes, most = CASES[case]
    paths = [make_checkpoint(name, tmp_path / f"checkpoint{seed}", seed=seed, **sizes) for seed in range(2)]
    bad = make_checkpoint(name, tmp_path / "bad", **sizes | {"rms_norm_eps": 0.5})
    uneven = make_checkpoint("qwen3", tmp_path / "uneven")  # of 6 heads each rank has 3, of 3 none has half
    one = torch_models.load(paths[0])
    inputs = prompts(one.config, rows=4, tokens=24)
    job = {
        "ranks": math.prod(axes.values()),
        "axes": axes,
        "directory": str(tmp_path),
        "checkpoints": [str(path) for path in paths],
        "bad": str(bad),
        "uneven": str(uneven),
        "inputs": {key: value.tolist() for key, value in inputs.items()},
    }
    found = run_ranks(job, tmp_path)
    real = inputs["attention_mask"].astype(bool)
    tokens = one.generate(**inputs, max_new_tokens=4, ignore_eos=True).tolist()
    alone = one.generate(inputs["input_ids"][:1], max_new_tokens=4, ignore_eos=True).tolist()
    logits = {"logits": one(**inputs).numpy().copy()}
    digests = [one.digests(), one.update_weights_from_disk(paths[1]).digests()]
    logits["changed"] = one(**inputs).numpy()
    for each in found:
        assert each["held"] <= most
        assert each["read"] <= most + 0.02  # and headers
        assert (each["tokens"], each["one by one"]) == (tokens, alone)
        assert [each["digests"], each["changed digests"]] == digests
        assert each["embed"]
        assert each["swapped"]
        assert each["moved"] == []
        assert each["still serving"]
        assert each["back"]
        assert each["slept"]
        assert "rms_norm_eps is 0.5" in each["bad on one"]
        assert "FileExistsError" in each["export again"]
        assert "expected alike: use a mesh that divides num_key_value_heads" in each["uneven"]
        for what in ("adapter", "graphs", "taps"):
            assert "is cut over a mesh" in each[what]
    assert found[0]["bad on one"].startswith(f"RuntimeError: {job['ranks'] - 1} of {job['ranks']} ranks failed")
    with np.load(tmp_path / "logits.npz") as saved:
        for key, expected in logits.items():
            assert error(saved[key][real], expected[real]) < 2e-6
    exported = one.export(tmp_path / "alone")
    assert {file.name: file.read_bytes() for file in exported.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "export").iterdir()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """torch.distributed of one rank, which is enough to be refused."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "it"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_mesh_of_one_rank_cuts_nothing(alone, tmp_path):
    path = make_checkpoint("qwen3", tmp_path / "it")
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tensor",))
    ours, plain = torch_models.load(path, mesh=mesh), torch_models.load(path)
    assert np.array_equal(ours([[3, 14, 15]]).numpy(), plain([[3, 14, 15]]).numpy())
    assert ours.digests() == plain.digests()


@pytest.mark.parametrize("names", [None, ("model",)])
def test_axes_without_meaning_are_a_value_error(alone, names, tmp_path):
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=names)
    with pytest.raises(ValueError, match="expected names among expert, tensor"):
        torch_models.load(make_checkpoint("qwen3", tmp_path / "it"), mesh=mesh)


def test_quantised_weights_are_refused_on_a_mesh(alone, tmp_path):
    path = make_checkpoint("qwen3", tmp_path / "it", quantization=ZooQuantization(), **block_sizes("qwen3"))
    with pytest.raises(ValueError, match="quantised weights are not cut over a mesh"):
        torch_models.load(path, mesh=init_device_mesh("cpu", (1,), mesh_dim_names=("tensor",)))
