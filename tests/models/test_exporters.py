"""What the two exporters write of tiny models: the documents and tensors that our reader must understand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exporters import MODELS, compressed_tensors_checkpoint, documents, modelopt_checkpoint, tensors, tiny_model
from safetensors import safe_open

from loaders import open_checkpoint
from loaders.nvfp4 import dequantize, quantize

LAYER = "model.layers.0."
Q = LAYER + "self_attn.q_proj."
MODELOPT_Q = {
    Q + "weight": ("U8", (64, 32)),
    Q + "weight_scale": ("F8_E4M3", (64, 4)),
    Q + "weight_scale_2": ("F32", ()),
    Q + "input_scale": ("F32", ()),
}
COMPRESSED_Q = {
    Q + "weight_packed": ("U8", (64, 32)),
    Q + "weight_scale": ("F8_E4M3", (64, 4)),
    Q + "weight_global_scale": ("F32", (1,)),
    Q + "input_global_scale": ("F32", (1,)),
}

# what the libraries write changes with their versions, not with ours: one of them is enough every time
KINDS = [kind if kind == "qwen3_5_moe" else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS]


def of(found: dict[str, tuple[str, tuple[int, ...]]], prefix: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: value for name, value in found.items() if name.startswith(prefix)}


def quantised(found: dict[str, tuple[str, tuple[int, ...]]]) -> set[str]:
    """Modules whose weight is packed, without the path to the text model."""
    modules = {name.rpartition(".")[0] for name, (dtype, _) in found.items() if dtype == "U8"}
    return {name.removeprefix("model.language_model.").removeprefix("model.") for name in modules}


def expected_modules(kind: str, *, only_mlp: bool = False) -> set[str]:
    """Every Linear inside the layers but routers and what decides on little."""
    experts = [f"experts.{index}." for index in range(4)] if "moe" in kind else [""]
    if kind == "qwen3_5_moe":
        experts.append("shared_expert.")
    wanted = set()
    for layer in range(2):
        is_linear = kind.startswith("qwen3_5") and layer == 0
        attention = [f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj")]
        attention = attention if is_linear else [f"self_attn.{name}_proj" for name in "qkvo"]
        wanted |= {f"layers.{layer}.{name}" for name in ([] if only_mlp else attention)}
        wanted |= {f"layers.{layer}.mlp.{expert}{name}_proj" for expert in experts for name in ("gate", "up", "down")}
    return wanted


@pytest.mark.parametrize("kind", KINDS)
def test_modelopt_w4a4(kind: str, tmp_path: Path) -> None:
    directory = modelopt_checkpoint(tmp_path, tiny_model(kind))
    found, said = tensors(directory), documents(directory)
    assert quantised(found) == expected_modules(kind)
    assert said["config.json"]["quant_method"] == "modelopt"
    assert said["config.json"]["quant_algo"] == "NVFP4"
    inside = said["hf_quant_config.json"]["quantization"]
    assert (inside["quant_algo"], inside["kv_cache_quant_algo"], inside["group_size"]) == ("NVFP4", None, 16)
    assert inside["exclude_modules"] == said["config.json"]["ignore"]
    if not kind.startswith("qwen3_5"):
        assert of(found, Q) == MODELOPT_Q
        assert {"lm_head", "model.embed_tokens"} <= set(inside["exclude_modules"])


@pytest.mark.parametrize("kind", KINDS)
def test_modelopt_w4a16(kind: str, tmp_path: Path) -> None:
    directory = modelopt_checkpoint(tmp_path, tiny_model(kind), recipe="w4a16")
    found, said = tensors(directory), documents(directory)
    assert quantised(found) == expected_modules(kind)
    assert not [name for name in found if name.endswith("input_scale")]
    assert said["config.json"]["quant_algo"] == "W4A16_NVFP4"
    assert "input_activations" not in said["config.json"]["config_groups"]["group_0"]


@pytest.mark.parametrize("kind", KINDS)
def test_modelopt_of_mlps_alone(kind: str, tmp_path: Path) -> None:
    directory = modelopt_checkpoint(tmp_path, tiny_model(kind), recipe="mlp")
    assert quantised(tensors(directory)) == expected_modules(kind, only_mlp=True)
    assert any(name.endswith("self_attn*") for name in documents(directory)["config.json"]["ignore"])


def test_modelopt_with_a_cache_in_fp8(tmp_path: Path) -> None:
    directory = modelopt_checkpoint(tmp_path, tiny_model("qwen3"), recipe="w4a4_kv_fp8")
    found, said = tensors(directory), documents(directory)
    assert found[LAYER + "self_attn.k_proj.k_scale"] == found[LAYER + "self_attn.v_proj.v_scale"] == ("F32", ())
    assert said["config.json"]["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert said["hf_quant_config.json"]["quantization"]["kv_cache_quant_algo"] == "FP8"


def test_modelopt_with_a_cache_that_casts_writes_no_scales_and_is_read(tmp_path: Path) -> None:
    directory = modelopt_checkpoint(tmp_path, tiny_model("qwen3"), recipe="w4a4_kv_fp8_cast")
    assert not [name for name in tensors(directory) if name.endswith(("k_scale", "v_scale"))]
    assert documents(directory)["hf_quant_config.json"]["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert open_checkpoint(directory).config.quantization.kv_cache == "cast"


@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_compressed_tensors(kind: str, activations: bool, tmp_path: Path) -> None:
    directory = compressed_tensors_checkpoint(tmp_path, tiny_model(kind), activations=activations)
    found, said = tensors(directory), documents(directory)["config.json"]
    assert quantised(found) == expected_modules(kind)
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", "nvfp4-pack-quantized")
    assert said["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert (said["config_groups"]["group_0"]["input_activations"] is not None) == activations
    assert "lm_head" in said["ignore"]
    assert any(name.endswith("input_global_scale") for name in found) == activations
    if kind == "qwen3" and activations:
        assert of(found, Q) == COMPRESSED_Q


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_the_codec_writes_what_the_exporters_write(kind: str, divide: bool, tmp_path: Path) -> None:
    """Of every quantised weight, of the largest magnitude of those that share its global scale."""
    model = tiny_model(kind)
    originals = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (compressed_tensors_checkpoint if divide else modelopt_checkpoint)(tmp_path, model)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    for path in sorted(expected_modules(kind)):
        path = f"model.{path}"
        parent, _, name = path.rpartition(".")
        together = next((g for g in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")) if name in g), (name,))
        amax = max(weight_of(originals, parent, other).abs().max().item() for other in together)
        weight = weight_of(originals, parent, name)
        expected = quantize(weight.float().numpy().astype("bfloat16"), amax=amax, divide=divide)
        words = ("weight_packed", "weight_global_scale") if divide else ("weight", "weight_scale_2")
        packed, block, scale = (stored[f"{path}.{word}"] for word in (words[0], "weight_scale", words[1]))
        np.testing.assert_array_equal(packed.numpy(), expected.packed, err_msg=path)
        np.testing.assert_array_equal(block.view(torch.uint8).numpy(), expected.block_scale.view(np.uint8))
        np.testing.assert_array_equal(scale.numpy(), expected.global_scale)
        back = dequantize(expected.packed, expected.block_scale, expected.global_scale, divide=divide)
        assert np.linalg.norm(back - weight.float().numpy()) < 0.12 * np.linalg.norm(weight.float().numpy())


def weight_of(originals: dict[str, torch.Tensor], parent: str, name: str) -> torch.Tensor:
    """A Linear's weight, or its part of a fused stack of experts."""
    if f"{parent}.{name}.weight" in originals:
        return originals[f"{parent}.{name}.weight"]
    experts, _, index = parent.rpartition(".")
    if name == "down_proj":
        return originals[f"{experts}.down_proj"][int(index)]
    return originals[f"{experts}.gate_up_proj"][int(index)].chunk(2)[name == "up_proj"]
