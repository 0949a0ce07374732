"""What torch is set to around a call changes nothing: a model computes in what it was loaded to compute in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import torch_models
from parity.zoo import block_sizes, make_checkpoint
from parity.zoo.adapters import make_adapter
from parity.zoo.draft import make_drafting_checkpoint
from torch_models.layers import rotary

IDS = [[3, 14, 15, 92, 65, 35], [89, 79, 32, 38, 46, 26]]
MASK = [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
MODELS = {
    "qwen3": {},
    "gemma3": {},
    "qwen3-moe": {"num_hidden_layers": 2},
    "qwen3_5-moe": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "nvfp4": {"dtype": "BF16", **block_sizes("qwen3")},
}


def load(name, directory):
    path = directory / name
    if not path.exists():
        make_checkpoint("qwen3" if name == "nvfp4" else name, path, **MODELS[name])
    return torch_models.load(path, "float32", quantize="nvfp4" if name == "nvfp4" else None)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float64], ids=str)
def test_a_default_dtype_while_loading_is_not_what_is_derived_in(name, ambient, tmp_path):
    plain = load(name, tmp_path)
    torch.set_default_dtype(ambient)
    try:
        model = load(name, tmp_path)
        inside = model(IDS, MASK)
    finally:
        torch.set_default_dtype(torch.float32)
    kinds = {one: tensor.dtype for one, tensor in plain.named_buffers()}
    assert {one: tensor.dtype for one, tensor in model.named_buffers()} == kinds
    for logits in (inside, model(IDS, MASK)):
        assert torch.equal(logits, plain(IDS, MASK))


@pytest.mark.parametrize("name", MODELS)
def test_autocast_around_a_call_rounds_nothing(name, tmp_path):
    model = load(name, tmp_path)

    def said():
        logits, cache = model.prefill(IDS, MASK, max_new_tokens=4)
        step, _ = model.decode([7, 3], cache)
        taps = model.with_taps(IDS, MASK, level="modules")[1]
        graphs = model.generate(IDS, MASK, 4, graphs=True)
        return [model(IDS, MASK), logits, step, graphs, model.generate(IDS, MASK, 4), *taps.values()]

    plain = said()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = said()
        assert torch.is_autocast_enabled("cpu")
    for a, b in zip(plain, found, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_autocast_around_a_draft_rounds_nothing(tmp_path):
    path = make_drafting_checkpoint(
        "qwen3_5", tmp_path / "it", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]
    )
    model = torch_models.load(path, mtp=True)
    plain = model.mtp_forward(IDS), model.generate(IDS, draft=model.draft)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.mtp_forward(IDS), model.generate(IDS, draft=model.draft)
    assert np.array_equal(plain[0][0].numpy(), found[0][0].numpy())
    assert torch.equal(plain[1], found[1])


def test_a_default_device_is_not_where_what_belongs_to_a_model_is_made(tmp_path, monkeypatch):
    """As of whoever set it to CUDA and has this model on the CPU; on meta nothing could be computed."""
    base = make_checkpoint("qwen3-yarn", tmp_path / "it")
    adapters = [make_adapter(base, tmp_path / str(seed), seed=seed, whole=("lm_head",)) for seed in range(2)]
    plain = torch_models.load(base)
    expected = [plain(IDS, MASK), plain.attach_lora(adapters[0], "a")(IDS, MASK)]
    expected += [plain.attach_lora(adapters[1], "b")(IDS, MASK, adapter=["a", "b"])]
    for function in (rotary._static_frequencies, rotary._exponents_on):
        function.cache_clear()
    model = torch_models.load(base)
    model.lm_head.weight.numpy()  # NumPy has seen it, so torch does not resize it
    with torch.device("meta"):
        found = [model(IDS, MASK), model.attach_lora(adapters[0], "a")(IDS, MASK)]
        found += [model.attach_lora(adapters[1], "b")(IDS, MASK, adapter=["a", "b"])]
        model.sleep()
        model.wake()
        found.append(model(IDS, MASK, adapter=["a", "b"]))
        model.detach_lora("a")
    assert all(map(torch.equal, found, [*expected, expected[-1]]))
