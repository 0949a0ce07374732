"""The quantised zoo: what it is asked for is what is on the disk, in the words of the exporters."""

import json

import jax
import numpy as np
import pytest

import jax_models
import torch_models
from loaders import open_checkpoint
from loaders.nvfp4 import dequantize
from loaders.quantization.schemes import Scheme, summary
from loaders.reading.plan import plan_load, specs_of
from loaders.stage import Stage
from parity.zoo import ZOO, ZooQuantization, block_sizes, make_checkpoint, prompts

W4A4, W4A16 = "NVFP4 with quantised inputs", "NVFP4, weights only"
FEW = {"num_hidden_layers": 2}
HYBRID = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
LAYERS = {"qwen3_5": HYBRID, "qwen3_5-moe": HYBRID}


def made(name, directory, *, aligned=False, seed=0, **how):
    sizes = block_sizes(name, aligned=aligned) | LAYERS.get(name, FEW)
    quantization = ZooQuantization(**how)
    return open_checkpoint(make_checkpoint(name, directory, seed=seed, quantization=quantization, **sizes))


def dequantized(checkpoint, module, scheme):
    read = {role: checkpoint.read(f"{module}.{leaf}") for role, leaf in scheme.leaves.items()}
    if scheme.weights == "fp8":
        return read["codes"].astype(np.float32) * read["global"]
    return dequantize(read["codes"], read["block"], read["global"], divide=scheme.divides)


def linears(checkpoint):
    """Module of every quantised matrix -> its scheme."""
    found = {}
    for scheme in {scheme for _, scheme in checkpoint.config.quantization.schemes}:
        leaf = scheme.leaves["codes"]
        names = [name for name, info in checkpoint.tensors.items() if name.endswith(f".{leaf}")]
        kinds = ("U8",) if scheme.weights == "nvfp4" else ("F8_E4M3",)
        modules = [name.removesuffix(f".{leaf}") for name in names if checkpoint.tensors[name].dtype in kinds]
        found |= dict.fromkeys(modules, scheme)
    return found


@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied", "qwen3-moe", "qwen3_5", "qwen3_5-moe"])
@pytest.mark.parametrize("spelling", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("activations", [False, True])
def test_every_linear_of_every_layer_is_quantised_and_its_values_are_close(name, spelling, activations, tmp_path):
    checkpoint = made(name, tmp_path / "q", spelling=spelling, activations=activations)
    plain = open_checkpoint(
        make_checkpoint(name, tmp_path / "p", experts="per expert", **block_sizes(name) | LAYERS.get(name, FEW))
    )
    assert checkpoint.config.quantization.spelling == spelling
    assert list(summary(checkpoint.config.quantization)) == [W4A4 if activations else W4A16]
    found = linears(checkpoint)
    left = {name for name, info in plain.tensors.items() if len(info.shape) == 2} - {f"{one}.weight" for one in found}
    allowed = ("embed_tokens", "lm_head", "mlp.gate.", "shared_expert_gate", "in_proj_a", "in_proj_b", "mtp.")
    assert all(any(word in name for word in allowed) for name in left), left
    for module, scheme in found.items():
        weight, got = plain.read(f"{module}.weight"), dequantized(checkpoint, module, scheme)
        assert 0.05 < np.linalg.norm(got - weight) / np.linalg.norm(weight) < 0.13, module


@pytest.mark.parametrize("spelling", ["modelopt", "compressed-tensors"])
def test_scales_that_are_to_differ_differ_and_scales_that_are_not_do_not(spelling, tmp_path):
    apart, alike = (made("qwen3-moe", tmp_path / str(unify), unify=unify, spelling=spelling) for unify in (False, True))
    groups = [
        [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")],
        [f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj")],
        [f"model.layers.0.mlp.experts.4.{name}" for name in ("gate_proj", "up_proj")],
    ]
    leaves = Scheme("nvfp4", True, spelling).leaves
    for group in groups:
        for role, apart_by in (("global", 1.2), ("input", 1.01)):
            values = sorted(float(apart.read(f"{module}.{leaves[role]}").item()) for module in group)
            assert all(b / a > apart_by for a, b in zip(values, values[1:], strict=False)), (group, role, values)
            assert len({float(alike.read(f"{module}.{leaves[role]}").item()) for module in group}) == 1


def test_experts_have_scales_of_their_own(tmp_path):
    checkpoint = made("qwen3-moe", tmp_path / "q", unify=False)
    for leaf in ("weight_scale_2", "input_scale"):
        names = [name for name in checkpoint.tensors if ".experts." in name and name.endswith(leaf)]
        assert len(names) == 15
        assert len({float(checkpoint.read(name)) for name in names}) == 15


def test_a_recipe_of_fp8_alone_says_so(tmp_path):
    checkpoint = made("qwen3", tmp_path / "q", fp8=("*",))
    assert checkpoint.quantization_document["quantization"]["quant_algo"] == "FP8"
    assert {scheme.weights for scheme in linears(checkpoint).values()} == {"fp8"}


def test_a_mixed_recipe_is_fp8_in_attention_and_nvfp4_in_the_rest(tmp_path):
    checkpoint = made("qwen3_5", tmp_path / "q", fp8=("*self_attn*", "*linear_attn*"), kv_cache=True)
    assert checkpoint.quantization_document["quantization"]["quant_algo"] == "MIXED_PRECISION"
    assert checkpoint.config.quantization.kv_cache
    for module, scheme in linears(checkpoint).items():
        assert (scheme.weights == "fp8") == ("attn" in module)
    table = checkpoint.config.quantization.table
    assert {table[f"model.layers.{layer}.mlp.up_proj"].weights for layer in (0, 1)} == {"nvfp4"}
    assert checkpoint.tensors["model.layers.1.self_attn.k_proj.k_scale"].shape == ()
    plain = open_checkpoint(make_checkpoint("qwen3_5", tmp_path / "p", **block_sizes("qwen3_5") | HYBRID))
    weight = plain.read("model.layers.1.self_attn.q_proj.weight")
    got = dequantized(checkpoint, "model.layers.1.self_attn.q_proj", Scheme("fp8", True))
    assert np.linalg.norm(got - weight) / np.linalg.norm(weight) < 0.04


@pytest.mark.parametrize("scope", ["config.json", "hf_quant_config.json"])
def test_one_document_alone_says_the_same_as_both(scope, tmp_path):
    both, one = made("qwen3", tmp_path / "both"), made("qwen3", tmp_path / "one", scope=scope)
    assert one.config == both.config
    assert ("quantization_config" in one.config_document) == (scope == "config.json")
    assert bool(one.quantization_document) == (scope != "config.json")


def test_modules_that_are_excluded_by_a_glob_stay_as_they_were(tmp_path):
    checkpoint = made("qwen3", tmp_path / "q", exclude=("model.layers.0.self_attn*",))
    assert "model.layers.0.self_attn*" in checkpoint.config_document["quantization_config"]["ignore"]
    assert checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"].dtype == "F32"
    assert checkpoint.tensors["model.layers.1.self_attn.q_proj.weight"].dtype == "U8"


def test_the_head_is_quantised_on_demand(tmp_path):
    checkpoint = made("qwen3", tmp_path / "q", head=True)
    assert checkpoint.config.quantization.table["lm_head"] == Scheme("nvfp4", True)


@pytest.mark.slow_unless("qwen3", "qwen3-moe", "qwen3_5-moe", "gemma3")
@pytest.mark.parametrize("name", ZOO)
def test_odd_sizes_are_odd_and_aligned_sizes_take_the_alias_path(name, tmp_path):
    for aligned in (False, True):
        sizes = block_sizes(name, aligned=aligned)
        config = open_checkpoint(
            make_checkpoint(name, tmp_path / str(aligned), quantization=ZooQuantization(), **sizes)
        ).config
        shapes = [
            spec.shape[-2:]
            for spec in specs_of(config, Stage())
            if spec.dtype == "F8_E4M3" and spec.axes[-1].endswith("/16")
        ]
        assert shapes
        for rows, blocks in shapes:
            assert (rows % 128 == 0) == aligned
            assert (blocks % 4 == 0) == aligned
            assert aligned or rows != blocks * 16


@pytest.mark.slow_unless("qwen3-how0", "qwen3-moe-how3")
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("qwen3", {"unify": False, "kv_cache": True}),
        ("qwen3", {"spelling": "compressed-tensors", "unify": False}),
        ("qwen3", {"fp8": ("*self_attn*",), "activations": False}),
        ("qwen3-moe", {"unify": False, "activations": False}),
    ],
)
def test_both_backends_load_it_bit_for_bit_and_say_something(name, how, tmp_path):
    checkpoint = made(name, tmp_path / "q", **how)
    inputs = prompts(checkpoint.config, rows=2, tokens=16)
    models = [module.load(tmp_path / "q") for module in (jax_models, torch_models)]
    assert models[0].digests() == models[1].digests()
    assert len(models[0].digests()) == len(plan_load(checkpoint, Stage()).tensors)
    for model in models:
        logits = np.asarray(jax.device_get(model(**inputs)) if model is models[0] else model(**inputs).detach())
        assert np.isfinite(logits[inputs["attention_mask"] == 1]).all()


def test_a_checkpoint_depends_on_its_seed_and_on_nothing_else(tmp_path):
    a, again, b = (made("qwen3", tmp_path / str(number), seed=seed) for number, seed in enumerate((0, 0, 1)))
    name = "model.layers.0.mlp.up_proj"
    for leaf in Scheme("nvfp4", True).leaves.values():
        assert a.read(f"{name}.{leaf}").tobytes() == again.read(f"{name}.{leaf}").tobytes()
        assert a.read(f"{name}.{leaf}").tobytes() != b.read(f"{name}.{leaf}").tobytes()


def test_documents_have_the_keys_of_the_exporters_in_their_order(tmp_path):
    made("qwen3-moe", tmp_path / "m", kv_cache=True)
    inside = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    keys = ["config_groups", "ignore", "quant_algo", "kv_cache_scheme", "producer", "quant_method"]
    assert list(inside) == keys
    assert inside["ignore"] == ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"]
    beside = json.loads((tmp_path / "m" / "hf_quant_config.json").read_text())
    assert list(beside) == ["producer", "quantization"]
    assert list(beside["quantization"]) == ["quant_algo", "kv_cache_quant_algo", "group_size", "exclude_modules"]
    made("qwen3-moe", tmp_path / "c", spelling="compressed-tensors")
    assert not (tmp_path / "c" / "hf_quant_config.json").exists()
    inside = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    assert inside["ignore"] == ["lm_head", "model.layers.0.mlp.gate"]


def test_what_only_modelopt_writes_is_refused_for_the_other():
    with pytest.raises(ValueError, match="modelopt"):
        ZooQuantization(spelling="compressed-tensors", kv_cache=True)
