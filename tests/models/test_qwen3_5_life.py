"""The life of Qwen3.5's weights: forms of experts, names, reload, export, pipeline stages, meshes; on both backends."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from qwen3_5_cases import CASES, DENSE, MOE, SECTIONS, Case, inputs_of, write
from reference import relative_error
from safetensors.torch import load_file, save_file

import jax_models
import torch_models
from jax_models.sharding import MESH_AXES
from jax_models.weights import flatten
from loaders import CheckpointError

MODELS = {"jax": jax_models, "torch": torch_models}
BACKENDS = pytest.mark.parametrize("backend", MODELS)
TWO = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
MORE = {
    "dense renamed": Case(DENSE | TWO, renames_text=True),
    "wrapped": Case(DENSE | TWO | {"rope_parameters": SECTIONS}, torch.bfloat16, is_wrapped=True),
    "moe fused": Case(MOE | TWO),
    "moe one by one": Case(MOE | TWO, experts="per expert", draft_experts="per expert"),
    # every cut axis has 4 whole units
    "even moe": Case(
        MOE
        | TWO
        | {
            "vocab_size": 208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "num_experts": 8,
            "shared_expert_intermediate_size": 24,
        }
        | {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
    ),
}
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return functools.cache(
        lambda name, seed=7: write((CASES | MORE)[name], tmp_path_factory.mktemp("checkpoint"), seed=seed)
    )


def as_numpy(value: Any) -> np.ndarray:
    return value.detach().float().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def same_tensors(a: Path, b: Path) -> bool:
    """Names, dtypes and bits."""
    ours, theirs = (load_file(path / "model.safetensors") for path in (a, b))
    return sorted(ours) == sorted(theirs) and all(
        value.dtype == theirs[name].dtype and torch.equal(value.view(torch.uint8), theirs[name].view(torch.uint8))
        for name, value in ours.items()
    )


def edited(source: Path, directory: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    directory.mkdir()
    save_file(edit(load_file(source / "model.safetensors")), directory / "model.safetensors")
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    return directory


# Names and forms


@BACKENDS
def test_a_vision_tower_not_asked_for_is_left_out_counted_and_exported_bit_for_bit(
    backend: str, checkpoint_of: Build, tmp_path: Path
) -> None:
    source = checkpoint_of("wrapped")
    model = MODELS[backend].load(source, vision=False)
    tensors = load_file(source / "model.safetensors")
    left_out = {name for name in tensors if name.startswith(("model.visual.", "mtp."))}
    assert sum(name.startswith("model.visual.") for name in left_out) > 15
    assert set(model.report.left_out) == left_out
    assert model.report.num_tensors == len(tensors) - len(left_out)
    assert same_tensors(source, model.export(tmp_path / "it"))


@BACKENDS
def test_the_text_class_may_carry_the_wrappers_names(backend: str, checkpoint_of: Build, tmp_path: Path) -> None:
    source, inputs = checkpoint_of("dense renamed"), inputs_of("left", rows=2, tokens=20)
    plain = edited(
        source, tmp_path / "plain", lambda found: {n.replace("language_model.", ""): v for n, v in found.items()}
    )
    assert "model.norm.weight" in load_file(plain / "model.safetensors")
    renamed, usual = (MODELS[backend].load(path, dtype="float32", mtp=True) for path in (source, plain))
    np.testing.assert_array_equal(as_numpy(renamed(**inputs)), as_numpy(usual(**inputs)))
    assert renamed.digests().keys() == load_file(source / "model.safetensors").keys()
    assert same_tensors(source, renamed.export(tmp_path / "export"))
    back = usual.update_weights_from_disk(source) or usual
    assert same_tensors(source, back.export(tmp_path / "reloaded"))


@BACKENDS
def test_both_spellings_at_once_are_refused_by_name(backend: str, checkpoint_of: Build, tmp_path: Path) -> None:
    both = edited(
        checkpoint_of("dense renamed"),
        tmp_path / "both",
        lambda found: found | {"model.norm.weight": found["model.language_model.norm.weight"].clone()},
    )
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        MODELS[backend].load(both)


@BACKENDS
@pytest.mark.parametrize(
    "where",
    [
        "model.layers.0",
        "mtp.layers.0",
    ],
)
def test_two_forms_of_one_parameter_are_refused_by_name(
    where: str, backend: str, checkpoint_of: Build, tmp_path: Path
) -> None:
    single = load_file(checkpoint_of("moe one by one") / "model.safetensors")
    name = f"{where}.mlp.experts.3.up_proj.weight"
    mixed = edited(checkpoint_of("moe fused"), tmp_path / "mixed", lambda found: found | {name: single[name]})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        MODELS[backend].load(mixed, mtp=True)
    gone = f"{where}.mlp.experts.4.gate_proj.weight"
    fewer = edited(
        checkpoint_of("moe one by one"),
        tmp_path / "fewer",
        lambda found: {n: v for n, v in found.items() if n != gone},
    )
    with pytest.raises(CheckpointError, match=gone.replace(".", r"\.")):
        MODELS[backend].load(fewer, mtp=True)


@BACKENDS
def test_reload_between_checkpoints_and_forms_is_bit_for_bit(
    backend: str, checkpoint_of: Build, tmp_path: Path
) -> None:
    inputs = inputs_of("right", rows=2, tokens=20)
    first, other = checkpoint_of("moe fused"), checkpoint_of("moe one by one", seed=8)
    model = MODELS[backend].load(first, dtype="float32", mtp=True)

    def answers(model: Any) -> list[np.ndarray]:
        return [as_numpy(model(**inputs)), *(as_numpy(part) for part in model.mtp_forward(**inputs))]

    before, digests = answers(model), model.digests()
    with compilations() as compiled:
        model = model.update_weights_from_disk(other) or model
        there = answers(model)
        model = model.update_weights_from_disk(first) or model
        again = answers(model)
    assert compiled == []
    assert all(np.array_equal(a, b) for a, b in zip(before, again, strict=True))
    assert model.digests() == digests
    assert same_tensors(first, model.export(tmp_path / "first"))
    fresh = MODELS[backend].load(other, dtype="float32", mtp=True)
    assert all(np.array_equal(a, b) for a, b in zip(there, answers(fresh), strict=True))
    assert relative_error(there[0], before[0]) > 0.1
    assert same_tensors(other, fresh.export(tmp_path / "other"))


@BACKENDS
def test_a_reload_with_other_layers_or_dtypes_changes_nothing(
    backend: str, checkpoint_of: Build, tmp_path: Path
) -> None:
    source = checkpoint_of("wrapped")
    model = MODELS[backend].load(source)
    digests = model.digests()
    name = "model.language_model.layers.0.linear_attn.A_log"
    rounded = edited(source, tmp_path / "rounded", lambda found: found | {name: found[name].bfloat16()})
    with pytest.raises(CheckpointError, match="A_log.*is BF16 in the checkpoint, expected F32"):
        model.update_weights_from_disk(rounded)
    turned = edited(source, tmp_path / "turned", lambda found: found)
    config = json.loads((turned / "config.json").read_text())
    config["text_config"]["layer_types"].reverse()
    (turned / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="layer_types"):
        model.update_weights_from_disk(turned)
    assert model.digests() == digests
    assert model.version == 1


# Pipeline stages


@BACKENDS
@pytest.mark.parametrize("name", ["interval 2 yarn", "moe interval 3 one by one tied"])
@pytest.mark.slow_unless("*-torch", "interval 2 yarn-jax")
def test_stages_chained_are_the_whole_model(name: str, backend: str, checkpoint_of: Build, tmp_path: Path) -> None:
    directory, inputs = checkpoint_of(name), inputs_of("left", rows=2, tokens=70)
    want = as_numpy(MODELS[backend].load(directory, dtype="float32")(**inputs))
    real_BT = inputs["attention_mask"] == 1
    for count in (2, 3):
        stages = [MODELS[backend].load(directory, dtype="float32", stage=(i, count)) for i in range(count)]
        hidden = stages[0](**inputs)
        for stage in stages[1:]:
            hidden = stage(attention_mask=inputs["attention_mask"], hidden_states=hidden)
        if backend == "torch":
            np.testing.assert_array_equal(as_numpy(hidden), want)
        assert relative_error(as_numpy(hidden)[real_BT], want[real_BT]) <= 2e-6


# Meshes


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Counts the programs that JAX compiles inside the block."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("even moe", (2, 1, 4)), ("even moe", (1, 4, 2)), ("dense", (1, 2, 2))],
)
@pytest.mark.slow_unless("even moe-sizes1")
@pytest.mark.usefixtures("eight_devices")
def test_a_mesh_is_the_same_model(name: str, sizes: tuple[int, ...], checkpoint_of: Build) -> None:
    directory, inputs = checkpoint_of(name), inputs_of("left", rows=2, tokens=70)
    inputs["input_ids"] %= 208
    mesh = Mesh(np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes), MESH_AXES)
    one, many = (jax_models.load(directory, dtype="float32", mtp=True, mesh=where) for where in (None, mesh))
    real_BT = inputs["attention_mask"] == 1
    assert relative_error(np.asarray(many(**inputs))[real_BT], np.asarray(one(**inputs))[real_BT]) <= 1e-5
    drafts = [np.asarray(model.mtp_forward(**inputs)[0])[real_BT[:, :-1] & real_BT[:, 1:]] for model in (many, one)]
    assert relative_error(*drafts) <= 1e-5
    if name == "even moe":
        cut = {key for key, array in flatten(many.weights).items() if not array.is_fully_replicated}
        assert {f"model.layers.0.linear_attn.{key}" for key in ("in_proj_qkv.weight", "A_log", "conv1d.weight")} <= cut
    tokens = [np.asarray(model.generate(**inputs, max_new_tokens=6, ignore_eos=True)) for model in (many, one)]
    assert tokens[0].tolist() == tokens[1].tolist()
    logits, cache = many.prefill(**inputs, max_new_tokens=8)
    before = jax.tree.map(lambda array: array.sharding, cache.arrays)
    old = cache.arrays.layers["0" if name == "even moe" else "1"]["state"]
    logits, cache = many.decode(np.argmax(np.asarray(logits), -1), cache)
    assert old.is_deleted()
    with compilations() as compiled:
        for _ in range(3):
            logits, cache = many.decode(np.argmax(np.asarray(logits), -1), cache)
        changed = many.update_weights_from_disk(directory)
        changed(**inputs)
        logits, other = changed.prefill(**inputs, max_new_tokens=8)
        changed.decode(np.argmax(np.asarray(logits), -1), other)
    assert compiled == []
    assert jax.tree.map(lambda array: array.sharding, cache.arrays) == before
    if name == "even moe":
        assert not before.layers["0"]["state"].is_fully_replicated
        assert not before.layers["0"]["conv"].is_fully_replicated
    assert changed.digests() == one.digests()
