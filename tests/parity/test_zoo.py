"""The zoo is real, repeatable and sensitive: held against transformers, tensor by tensor."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from loaders import Checkpoint, CheckpointError, open_checkpoint
from loaders.digest import digests, root_digest
from loaders.families import FAMILIES
from parity.zoo import HUGE_TOKEN, TINY_TOKEN, TWIN_TOKENS, ZOO, canaries, make_checkpoint, prompts, zoo_config

SPARSE = [name for name in ZOO if "num_experts" in ZOO[name].config]
TIED = [name for name in ZOO if ZOO[name].config["tie_word_embeddings"]]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    @cache
    def made(name: str, **options: Any) -> Checkpoint:
        return open_checkpoint(make_checkpoint(name, tmp_path_factory.mktemp(name) / "checkpoint", **options))

    return made


@pytest.fixture(scope="module")
def theirs() -> Callable[..., Any]:
    @cache
    def loaded(checkpoint: str, dtype: torch.dtype) -> Any:
        model, report = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
        return model.eval()

    return lambda checkpoint, dtype=torch.float32: loaded(str(checkpoint.source), dtype)


def inputs(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in prompts(checkpoint.config).items()}


def logits_of(model: Any, checkpoint: Checkpoint) -> np.ndarray:
    """Float64 [real tokens, V]."""
    given = inputs(checkpoint)
    with torch.no_grad():
        return model(**given).logits[given["attention_mask"].bool()].double().numpy()


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


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
    }


def test_the_zoo_needs_numpy_alone() -> None:
    program = "import sys, parity.zoo; print(sorted({'torch', 'jax', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


# Repeatable


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
def test_another_dtype_is_another_rounding_of_the_same_weights(zoo: Callable[..., Checkpoint], dtype: str) -> None:
    rounded = zoo("qwen3-moe", dtype=dtype)
    assert {info.dtype for info in rounded.tensors.values()} == {dtype}
    for name, array in zoo("qwen3-moe").stream():
        np.testing.assert_array_equal(rounded.read(name), array.astype(rounded.read(name).dtype))


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
    np.testing.assert_array_equal(shipped.read("lm_head.weight"), shipped.read("model.embed_tokens.weight"))
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
    config: Any = zoo(name).config
    sizes = {letter: dim.size for letter, dim in config.dims().items()}
    assert config.head_dim * config.num_attention_heads != config.hidden_size
    assert sizes["NH"] != sizes["KH"]
    assert config.vocab_size % 2 == 1
    assert all(sizes[letter] % 16 for letter in "VDF")
    assert len({sizes[letter] for letter in ("V", "D", "F", "NH")}) == 4


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
    assert TIED == ["qwen3-tied", "qwen3-moe-nonorm"]


# Sensitive


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_spread_over_about_three_and_predict_many_tokens(
    zoo: Callable[..., Checkpoint], theirs: Callable[..., Any], name: str, seed: int
) -> None:
    checkpoint = zoo(name, seed=seed)
    logits = logits_of(theirs(checkpoint), checkpoint)
    assert 2.5 < logits.std() < 3.7
    chosen, times = np.unique(logits.argmax(axis=1), return_counts=True)
    assert len(chosen) > 25
    assert times.max() < len(logits) / 3


@pytest.mark.parametrize("name", ZOO)
def test_every_attention_and_every_mlp_moves_the_residual_stream(
    zoo: Callable[..., Checkpoint], theirs: Callable[..., Any], name: str
) -> None:
    checkpoint = zoo(name)
    model = theirs(checkpoint)
    mask = inputs(checkpoint)["attention_mask"].bool().reshape(-1)
    sizes: dict[str, float] = {}

    def keep(where: str) -> Callable[..., None]:
        def hook(module: Any, given: Any, out: Any) -> None:
            branch = (out[0] if isinstance(out, tuple) else out).reshape(len(mask), -1)[mask]
            sizes[where] = branch.square().mean(dim=1).sqrt().median().item()

        return hook

    handles = []
    for number, layer in enumerate(model.model.layers):
        handles.append(layer.self_attn.register_forward_hook(keep(f"attention {number}")))
        handles.append(layer.mlp.register_forward_hook(keep(f"mlp {number}")))
    logits_of(model, checkpoint)
    for handle in handles:
        handle.remove()
    assert len(sizes) == 2 * checkpoint.config.num_hidden_layers
    assert {where: size for where, size in sizes.items() if not 0.5 < size < 4.5} == {}


@pytest.mark.parametrize("name", ZOO)
def test_nothing_is_left_as_a_library_initialises_it(zoo: Callable[..., Checkpoint], name: str) -> None:
    norms = []
    for tensor, stored in zoo(name).stream():
        array = stored.astype(np.float64)
        assert not np.isin(array, (0.0, 1.0)).any()
        if tensor.endswith("norm.weight"):
            norms.append(array)
            assert 0.05 < array.std() < 0.6
            assert 0.6 < array.mean() < 1.4
        elif tensor.endswith(".bias"):
            assert 0.1 < array.std() < 0.5
    assert len(norms) == 4 * zoo(name).config.num_hidden_layers + 1


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3-tied", "qwen3-bias", "qwen3-sliding", "qwen3-moe", "qwen3-moe-nonorm"]
)
def test_one_percent_of_any_tensor_moves_the_logits(
    zoo: Callable[..., Checkpoint], theirs: Callable[..., Any], name: str
) -> None:
    checkpoint = zoo(name)
    model = theirs(checkpoint)
    expected = logits_of(model, checkpoint)
    generator = torch.Generator().manual_seed(0)
    moved: dict[str, float] = {}
    state = model.state_dict()  # experts are fused there: gate, up and down of one expert are slices
    parts = {
        (key, expert): state[key][expert] if expert is not None else state[key]
        for key in state
        for expert in (range(state[key].shape[0]) if ".experts." in key else [None])
        if not (key == "lm_head.weight" and checkpoint.config.tie_word_embeddings)
    }
    for part, tensor in parts.items():
        kept = tensor.clone()
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.add_(noise * kept.square().mean().sqrt() * 0.01)
        moved[str(part)] = distance(logits_of(model, checkpoint), expected)
        tensor.copy_(kept)
    assert distance(logits_of(model, checkpoint), expected) == 0
    # a hundred times the noise of float32
    assert {part: by for part, by in moved.items() if by < 1e-4} == {}


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("qwen3", {"rms_norm_eps": 1e-5}),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("qwen3-yarn", {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}),
        ("qwen3-sliding", {"use_sliding_window": False, "layer_types": None}),
        ("qwen3-sliding", {"sliding_window": 25}),
        ("qwen3-moe", {"norm_topk_prob": False}),
        ("qwen3-moe-nonorm", {"norm_topk_prob": True}),
        ("qwen3-moe", {"num_experts_per_tok": 1}),
    ],
)
def test_every_option_moves_the_logits(
    zoo: Callable[..., Checkpoint], theirs: Callable[..., Any], tmp_path: Path, name: str, other: dict[str, Any]
) -> None:
    right, wrong = zoo(name), open_checkpoint(make_checkpoint(name, tmp_path / "other", **other))
    assert digests(right.stream()) == digests(wrong.stream())
    assert distance(logits_of(theirs(wrong), wrong), logits_of(theirs(right), right)) > 1e-2


@pytest.mark.parametrize("name", SPARSE)
def test_routing_survives_bf16_and_hears_every_expert(
    zoo: Callable[..., Checkpoint], theirs: Callable[..., Any], name: str
) -> None:
    checkpoint = zoo(name, dtype="BF16")
    mask = inputs(checkpoint)["attention_mask"].bool().reshape(-1)
    routed: dict[torch.dtype, list[torch.Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        found = routed[dtype] = []

        def keep(gate: Any, given: Any, out: Any, found: list[torch.Tensor] = found) -> None:
            hidden = given[0].reshape(len(mask), -1)[mask]
            found.append(torch.softmax(hidden.float() @ gate.weight.float().T, dim=-1))

        model = theirs(checkpoint, dtype)
        sparse = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
        handles = [gate.register_forward_hook(keep) for gate in sparse]
        logits_of(model, checkpoint)
        for handle in handles:
            handle.remove()
    for exact, rounded in zip(routed[torch.float32], routed[torch.bfloat16], strict=True):
        top, again = exact.topk(2), rounded.topk(2)
        same = (top.indices.sort().values == again.indices.sort().values).all(dim=1)
        assert same.float().mean() > 0.95
        assert torch.bincount(top.indices.flatten(), minlength=5).min() > len(top.indices) / 30
        assert (top.values[:, 1] / top.values[:, 0]).median() > 0.1


@pytest.mark.parametrize("name", ZOO)
def test_canary_rows_are_in_the_embedding(zoo: Callable[..., Checkpoint], name: str) -> None:
    embedding = zoo(name).read("model.embed_tokens.weight").astype(np.float64)
    size = np.sqrt(np.square(embedding).mean(axis=1))
    usual = np.median(size)
    assert size[TINY_TOKEN] < 3e-3 * usual
    assert size[TINY_TOKEN] ** 2 < 1e-5  # beside rms_norm_eps = 1e-6
    assert (size[HUGE_TOKEN] > 15 * usual) == (name not in TIED)
    np.testing.assert_array_equal(embedding[TWIN_TOKENS[0]], embedding[TWIN_TOKENS[1]])
    assert len(np.unique(embedding, axis=0)) == len(embedding) - 1


# Prompts


@pytest.mark.parametrize("padding", ["right", "left", None])
def test_prompts_have_rows_of_different_length_and_every_canary_in_each(
    zoo: Callable[..., Checkpoint], padding: Any
) -> None:
    config = zoo("qwen3").config
    found = prompts(config, rows=3, tokens=96, padding=padding, seed=5)
    ids_BT, mask_BT = found["input_ids"], found["attention_mask"]
    assert list(found) == ["input_ids", "attention_mask"]
    assert (ids_BT.shape, ids_BT.dtype, mask_BT.dtype) == ((3, 96), np.int64, np.int64)
    assert mask_BT.sum(axis=1).tolist() == ([96, 96, 96] if padding is None else [96, 72, 48])
    starts = {"right": [0, 0, 0], "left": [0, 24, 48], None: [0, 0, 0]}[padding]
    assert mask_BT.argmax(axis=1).tolist() == starts
    assert ids_BT.min() >= 0
    assert ids_BT.max() == config.vocab_size - 1
    for row in range(3):
        assert set(canaries(config)) <= set(ids_BT[row][mask_BT[row] == 1].tolist())


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
