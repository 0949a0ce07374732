"""The zoo is real and repeatable: held against transformers, tensor by tensor. test_zoo_sensitivity.py has the rest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zoo_peers import HYBRID, SPARSE, TIED, WRAPPED, checkpoints, logits_of, peers, specs

from loaders import Checkpoint, CheckpointError, open_checkpoint
from loaders.digest import digests, root_digest
from loaders.families import FAMILIES, family_module
from parity.record import default_inputs
from parity.zoo import ZOO, canaries, make_checkpoint, prompts, zoo_config
from torch_models.layers.gated_delta import CHUNK


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    return checkpoints(tmp_path_factory)


@pytest.fixture(scope="module")
def theirs() -> Callable[..., Any]:
    return peers()


def test_every_architecture_is_in_the_zoo() -> None:
    assert {model.architecture for model in ZOO.values()} == set(FAMILIES)
    assert set(ZOO) >= {
        "qwen3",
        "qwen3-tied",
        "qwen3-bias",
        "qwen3-sliding",
        "qwen3-yarn",
        "qwen3-deep",
        "qwen3-moe",
        "qwen3-moe-nonorm",
        "qwen3_5",
        "qwen3_5-tied",
        "qwen3_5-moe",
        "qwen3_5-wrapped",
        "qwen3_5-moe-wrapped",
        "gemma3",
        "gemma3-capped",
    }


def test_the_zoo_needs_numpy_alone() -> None:
    program = "import sys, parity.zoo; print(sorted({'torch', 'jax', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


# Repeatable


@pytest.mark.slow_unless("qwen3", "qwen3_5-moe", "qwen3_vl")
@pytest.mark.parametrize("name", ZOO)
def test_name_and_seed_decide_every_bit(zoo: Callable[..., Checkpoint], tmp_path: Path, name: str) -> None:
    first, second = zoo(name), open_checkpoint(make_checkpoint(name, tmp_path / "again", max_file_bytes=40_000))
    assert len({info.file for info in second.tensors.values()}) > 1
    ours = digests(first.stream())
    assert ours == digests(second.stream())
    other = digests(zoo(name, seed=1).stream())
    assert not set(ours.values()) & set(other.values())
    assert len(set(ours.values())) == len(ours)  # no two tensors are equal


def test_two_models_of_the_zoo_share_no_weights(zoo: Callable[..., Checkpoint]) -> None:
    roots = {root_digest(digests(zoo(name).stream())) for name in ZOO}
    assert len(roots) == len(ZOO)
    assert (
        digests(zoo("qwen3").stream())["model.norm.weight"] != digests(zoo("qwen3-bias").stream())["model.norm.weight"]
    )


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3_5-moe-wrapped", "gemma3"])
def test_another_dtype_is_another_rounding_of_the_same_weights(
    zoo: Callable[..., Checkpoint], name: str, dtype: str
) -> None:
    rounded = zoo(name, dtype=dtype)
    kept = {tensor for tensor in rounded.tensors if tensor.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))}
    assert len(kept) == (2 * 3 if name in HYBRID else 0)
    assert {tensor for tensor, info in rounded.tensors.items() if info.dtype == "F32"} == kept  # as published
    assert {rounded.tensors[tensor].dtype for tensor in set(rounded.tensors) - kept} == {dtype}
    for tensor, array in zoo(name).stream():
        np.testing.assert_array_equal(rounded.read(tensor), array.astype(rounded.read(tensor).dtype))


@pytest.mark.parametrize("count", [1, 5])  # of one there is one source in either form
def test_both_forms_of_the_experts_are_one_model(count: int, zoo: Callable[..., Checkpoint]) -> None:
    sizes = {"num_experts": count, "num_experts_per_tok": min(count, 2)}
    fused = zoo("qwen3_5-moe", experts="fused", draft_experts="fused", **sizes)
    apart = zoo("qwen3_5-moe", experts="per expert", draft_experts="per expert", **sizes)
    for found, is_fused in ((fused, True), (apart, False)):
        last = f"experts.{count - 1}.up_proj.weight"
        assert any(tensor.endswith("experts.gate_up_proj") for tensor in found.tensors) == is_fused
        assert any(tensor.endswith(last) for tensor in found.tensors) == (not is_fused)
    for spec in specs(fused):
        if "experts" not in spec.name:
            np.testing.assert_array_equal(fused.read(spec.name), apart.read(spec.name))
            continue
        whole, place = fused.read(spec.name), spec.name.rpartition(".")[0]
        for expert in range(count):
            down, gate, up = (apart.read(f"{place}.{expert}.{kind}_proj.weight") for kind in ("down", "gate", "up"))
            expected = down if spec.name.endswith("down_proj") else np.concatenate([gate, up])
            np.testing.assert_array_equal(whole[expert], expected)


def test_an_option_leaves_all_other_weights_alone(zoo: Callable[..., Checkpoint]) -> None:
    plain, wide = digests(zoo("qwen3").stream()), digests(zoo("qwen3", intermediate_size=60).stream())
    assert {name for name in plain if plain[name] != wide[name]} == {
        f"model.layers.{layer}.mlp.{kind}_proj.weight" for layer in range(4) for kind in ("gate", "up", "down")
    }


def test_an_override_the_loader_refuses_is_refused_here(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="head_dim=7 is odd"):
        make_checkpoint("qwen3", tmp_path / "checkpoint", head_dim=7)
    with pytest.raises(ValueError, match="vocab_size=18 has no room for the canaries, expected >= 19"):
        make_checkpoint("qwen3", tmp_path / "checkpoint", vocab_size=18)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_is_shipped_only_on_request_and_then_equal(zoo: Callable[..., Checkpoint], name: str) -> None:
    assert "lm_head.weight" not in zoo(name).tensors
    shipped = zoo(name, ship_tied_head=True)
    assert shipped.tensors["lm_head.weight"].shape == (shipped.config.vocab_size, shipped.config.hidden_size)
    embedding = f"{shipped.config.text_paths[0]}.embed_tokens.weight"
    np.testing.assert_array_equal(shipped.read("lm_head.weight"), shipped.read(embedding))
    assert set(shipped.tensors) - set(zoo(name).tensors) == {"lm_head.weight"}


# Real


def test_both_spellings_of_config_json_are_what_the_world_writes() -> None:
    v5, hub = zoo_config("qwen3-moe", dtype="BF16"), zoo_config("qwen3-moe", dtype="BF16", spelling="hub")
    assert (v5["num_local_experts"], hub["num_experts"]) == (5, 5)
    assert (v5["dtype"], hub["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert v5["rope_parameters"] == {"rope_type": "default", "rope_theta": 50000.0}
    assert (hub["rope_theta"], hub["rope_scaling"]) == (50000.0, None)
    assert not {"num_experts", "torch_dtype", "rope_theta", "rope_scaling"} & set(v5)
    assert not {"num_local_experts", "dtype", "rope_parameters"} & set(hub)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert zoo_config("qwen3-yarn", spelling="hub")["rope_scaling"] == yarn
    gemma = zoo_config("gemma3-capped", spelling="hub")
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"], gemma["sliding_window_pattern"]) == (5e4, 1e3, 3)
    assert gemma["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert not {"layer_types", "rope_parameters", "dtype"} & set(gemma)
    outer = zoo_config("qwen3_5-moe-wrapped", spelling="hub", dtype="BF16")
    text = outer["text_config"]
    assert (outer["model_type"], text["model_type"], text["torch_dtype"]) == (
        *("qwen3_5_moe", "qwen3_5_moe_text", "bfloat16"),
    )
    assert (text["full_attention_interval"], text["partial_rotary_factor"], text["attn_output_gate"]) == (4, 0.75, True)
    assert not {"vision_config", "architectures"} & set(text)
    assert not {"hidden_size", "num_experts"} & set(outer)


@pytest.mark.parametrize("name", ZOO)
def test_a_checkpoint_holds_what_its_family_declares_and_what_is_left_out_of_a_text_model(
    zoo: Callable[..., Checkpoint], name: str
) -> None:
    checkpoint = zoo(name)
    own = {placement.tensor for spec in specs(checkpoint) for placement in spec.placements}
    assert own == set(checkpoint.tensors)
    assert any(tensor.startswith("model.visual.") for tensor in own) == (name in WRAPPED)
    assert any(tensor.startswith("mtp.layers.0.mlp.") for tensor in own) == (name in HYBRID)
    text = "model.language_model" if name in WRAPPED else "model"
    assert f"{text}.norm.weight" in own
    left_out = family_module(checkpoint.config.architecture).LEFT_OUT
    optional = {tensor for tensor in checkpoint.tensors if any(pattern.fullmatch(tensor) for pattern in left_out)}
    assert optional == {tensor for tensor in own if tensor.startswith(("mtp.", "model.visual."))}


@pytest.mark.parametrize(
    ("name", "form", "draft"),
    [
        ("qwen3-moe", "per expert", None),
        ("qwen3_5-moe", "fused", "fused"),
        ("qwen3_5-moe-wrapped", "fused", "per expert"),
    ],
)
def test_experts_come_in_the_form_that_is_declared(
    zoo: Callable[..., Checkpoint], name: str, form: str, draft: str | None
) -> None:
    experts = [tensor for tensor in zoo(name).tensors if ".experts." in tensor]
    for is_draft, declared in ((False, form), (True, draft)):
        found = [tensor for tensor in experts if tensor.startswith("mtp.") == is_draft]
        assert {tensor.split(".experts.")[1][0].isdigit() for tensor in found} == (
            set() if declared is None else {declared == "per expert"}
        )
    assert ZOO[name].experts[0] == form
    assert draft is None or ZOO[name].experts[1] == draft


@pytest.mark.parametrize("name", ZOO)
def test_transformers_loads_every_tensor_and_computes_the_same_from_both_spellings(
    zoo: Callable[..., Checkpoint], theirs: Callable[..., Any], name: str
) -> None:
    v5, hub = zoo(name), zoo(name, spelling="hub")
    assert v5.config == hub.config
    assert v5.eos_token_ids == hub.eos_token_ids == (2,)
    np.testing.assert_array_equal(logits_of(theirs(v5), v5), logits_of(theirs(hub), hub))


@pytest.mark.parametrize("name", ZOO)
def test_sizes_do_not_agree_by_accident(zoo: Callable[..., Checkpoint], name: str) -> None:
    checkpoint = zoo(name)
    config: Any = checkpoint.config
    dims = {letter: dim.size for letter, dim in config.dims().items()}
    # tensors of different axes differ in shape, and transposed too; no matrix is square
    axes_of: dict[tuple[int, ...], set[tuple[str, ...]]] = {}
    rules = specs(checkpoint).rules
    for tensor, rule in ((tensor, rules[tensor]) for tensor in rules if tensor in checkpoint.tensors):
        shape, letters = checkpoint.tensors[tensor].shape, rule.dims.split()
        assert shape == tuple(int(letter) if letter.isdigit() else dims[letter] for letter in letters)
        if rule.is_visual:  # its patches and its mergers are square by nature
            continue
        assert len(set(shape)) == len(shape), tensor
        axes_of.setdefault(tuple(sorted(shape)), set()).add(tuple(sorted(letters)))
    assert {shape: axes for shape, axes in axes_of.items() if len(axes) > 1} == {}
    # nor do axes, but an expert's gate and up are as wide as all keys: tensors of another rank
    used = {letter for axes in axes_of.values() for letters in axes for letter in letters} - {"1", "2M"}
    used -= {"KH"} if config.num_key_value_heads == 1 else set()
    assert len({dims[letter] for letter in used}) == len(used), dims
    assert not [letter for letter in used & {"V", "D", "F", "M", "SF"} if dims[letter] % 16 == 0]
    assert config.vocab_size % 2 == 1
    assert config.head_dim * config.num_attention_heads != config.hidden_size
    assert config.num_attention_heads != config.num_key_value_heads
    if name in HYBRID:
        heads = (config.num_key_value_heads, config.linear_num_key_heads, config.linear_num_value_heads)
        widths = (config.head_dim, config.linear_key_head_dim, config.linear_value_head_dim, config.rotary_dim)
        assert (len(set(heads)), len(set(widths))) == (3, 4)
        assert config.linear_num_value_heads // config.linear_num_key_heads != (
            config.num_attention_heads // config.num_key_value_heads
        )
    if "query_pre_attn_scalar" in ZOO[name].config:
        assert config.query_pre_attn_scalar not in (config.head_dim, config.hidden_size / config.num_attention_heads)


def test_the_special_models_are_special(zoo: Callable[..., Checkpoint]) -> None:
    configs: dict[str, Any] = {name: zoo(name).config for name in ZOO}
    assert configs["qwen3-deep"].num_hidden_layers >= 12
    assert [configs["qwen3-sliding"].window(layer) for layer in range(4)] == [24, None, 24, None]
    assert configs["qwen3-yarn"].rope_parameters.original_max_position_embeddings < 96  # prompts go beyond
    assert [configs["qwen3-moe"].is_sparse(layer) for layer in range(4)] == [True, False, True, True]
    assert [configs["qwen3-moe-nonorm"].is_sparse(layer) for layer in range(4)] == [False, True, False, True]
    assert (configs["qwen3-moe"].norm_topk_prob, configs["qwen3-moe-nonorm"].norm_topk_prob) == (True, False)
    assert (configs["qwen3-moe"].num_experts, configs["qwen3-moe"].num_experts_per_tok) == (5, 2)
    assert configs["qwen3-bias"].attention_bias
    assert TIED == ["qwen3-tied", "qwen3-moe-nonorm", "qwen3_5-tied", "qwen3_vl-moe", "gemma3", "gemma3-capped"]
    assert WRAPPED == ["qwen3_5-wrapped", "qwen3_5-moe-wrapped", "qwen3_vl", "qwen3_vl-moe"]
    for name in HYBRID:
        config = configs[name]
        assert [config.has_linear_attention(layer) for layer in range(4)] == [True, True, False, True]
        assert [config.is_sparse(layer) for layer in range(4)] == [name in SPARSE] * 4
        assert config.rotary_dim == 12 < config.head_dim
        assert config.rope_parameters.mrope_section == (3, 2, 1)
        assert config.num_mtp_layers == 1
    gemma, capped = configs["gemma3"], configs["gemma3-capped"]
    assert [gemma.window(layer) for layer in range(5)] == [24, 24, None, 24, 24]
    assert [gemma.rope(layer).rope_theta for layer in range(5)] == [1e3, 1e3, 5e4, 1e3, 1e3]
    assert [capped.rope(layer).rope_type for layer in (0, 2)] == ["default", "linear"]
    caps = [(config.attn_logit_softcapping, config.final_logit_softcapping) for config in (gemma, capped)]
    assert caps == [(None, None), (4.0, 12.0)]


# Prompts


@pytest.mark.parametrize("padding", ["right", "left", "both", None])
def test_prompts_have_rows_of_different_length_and_every_canary_in_each(
    zoo: Callable[..., Checkpoint], padding: Any
) -> None:
    config = zoo("qwen3").config
    found = prompts(config, rows=3, tokens=96, padding=padding, seed=5)
    ids_BT, mask_BT = found["input_ids"], found["attention_mask"]
    assert list(found) == ["input_ids", "attention_mask"]
    assert (ids_BT.shape, ids_BT.dtype, mask_BT.dtype) == ((3, 96), np.int64, np.int64)
    assert mask_BT.sum(axis=1).tolist() == ([96, 96, 96] if padding is None else [96, 72, 48])
    starts = {"right": [0, 0, 0], "left": [0, 24, 48], "both": [0, 0, 48], None: [0, 0, 0]}[padding]
    assert mask_BT.argmax(axis=1).tolist() == starts
    assert ids_BT.min() >= 0
    assert ids_BT.max() == config.vocab_size - 1
    for row in range(3):
        assert set(canaries(config)) <= set(ids_BT[row][mask_BT[row] == 1].tolist())


def test_what_is_run_by_default_is_padded_on_both_sides(zoo: Callable[..., Checkpoint]) -> None:
    mask_BT = default_inputs(zoo("qwen3"))["attention_mask"]
    assert mask_BT[:, [0, -1]].tolist() == [[1, 1], [1, 0], [0, 1]]  # what a row looks back at, and what it does not


def test_what_a_recurrent_model_is_run_on_reaches_into_a_third_chunk(zoo: Callable[..., Checkpoint]) -> None:
    lengths = {name: default_inputs(zoo(name))["attention_mask"].sum(axis=1).max() for name in ("qwen3", "qwen3_5")}
    assert lengths["qwen3"] == 96 <= 2 * CHUNK < lengths["qwen3_5"]


def test_prompts_depend_on_their_arguments_alone(zoo: Callable[..., Checkpoint]) -> None:
    config = zoo("qwen3").config
    np.testing.assert_array_equal(prompts(config, seed=3)["input_ids"], prompts(config, seed=3)["input_ids"])
    assert not np.array_equal(prompts(config, seed=3)["input_ids"], prompts(config, seed=4)["input_ids"])


def test_rows_too_short_for_the_canaries_are_refused(zoo: Callable[..., Checkpoint]) -> None:
    config = zoo("qwen3").config
    assert prompts(config, rows=1, tokens=10)["attention_mask"].sum() == 10
    assert prompts(config, rows=5, tokens=10)["attention_mask"].sum(axis=1).tolist() == [10, 9, 8, 7, 5]
    with pytest.raises(ValueError, match="tokens=9 has no room for 5 canaries in half a row"):
        prompts(config, tokens=9)
