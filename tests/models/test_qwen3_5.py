"""Qwen3.5 on both backends against transformers, on checkpoints that it wrote: hidden states, tokens, caches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qwen3_5_cases import CASES, FILL, FULL, LINEAR, inputs_of, reference, reference_model, write
from reference import relative_error
from shape_suffixes import checked_shape_suffixes
from test_against_transformers import errors, loaded, ours

import loaders
from parity.oracle import oracle_forward
from parity.ruler import LIMITS

BOUND = 2e-5
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return functools.cache(lambda name: write(CASES[name], tmp_path_factory.mktemp("checkpoint")))


def assert_agree(directory: Path, inputs: dict[str, np.ndarray]) -> None:
    is_real_BT = inputs["attention_mask"] == 1
    want = reference(directory, inputs)
    by_side = {side: ours(side, directory, inputs) for side in ("jax", "torch")}
    found = {side: errors(got, want, is_real_BT) for side, got in by_side.items()}
    print({side: f"{max(by_name.values()):.1e} logits {by_name['logits']:.1e}" for side, by_name in found.items()})
    over = {side: {n: e for n, e in by_name.items() if e > BOUND} for side, by_name in found.items()}
    assert not any(over.values()), over
    assert all(np.isfinite(value).all() for got in by_side.values() for value in got.values())  # also at padding


KINDS = [
    *((name, kind) for name in CASES for kind in ("left", "both")),
    *(("dense", kind) for kind in ("plain", "right", "far")),
    *(("moe", kind) for kind in ("right", "far")),
    ("interval 2 yarn", "far"),
    ("wrapped tied", "three axes"),
    ("wrapped moe bf16 files", "three axes"),
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_every_hidden_state_agrees_in_float32(name: str, kind: str, checkpoint_of: Build) -> None:
    assert_agree(checkpoint_of(name), inputs_of(kind))


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 128, 129])
def test_every_hidden_state_agrees_in_any_length(tokens: int, checkpoint_of: Build) -> None:
    with checked_shape_suffixes("jax_models", "torch_models"):
        assert_agree(checkpoint_of("dense"), inputs_of("plain", rows=1, tokens=tokens))


def test_the_cases_are_what_their_names_say(checkpoint_of: Build) -> None:
    patterns = {loaders.open_checkpoint(checkpoint_of(name)).config.layer_types for name in CASES}
    assert patterns >= {(FULL, LINEAR, LINEAR), (LINEAR, FULL, LINEAR), (LINEAR, LINEAR, FULL), (LINEAR, FULL) * 2}
    for name, case in CASES.items():
        found = loaders.open_checkpoint(checkpoint_of(name))
        assert ("layer_types" not in found.config_document) == (case.interval is not None or case.is_wrapped)
        kinds = {info.dtype for info in found.tensors.values()}
        assert kinds == ({"F32"} if case.dtype == torch.float32 else {"F32", "BF16"}), name
        assert any(".visual." in tensor for tensor in found.tensors) == case.is_wrapped
        assert (case.is_moe and case.experts == "per expert") == any(
            ".layers.0.mlp.experts.0." in tensor for tensor in found.tensors if not tensor.startswith("mtp.")
        )
    model = reference_model(checkpoint_of("dense"))
    logits = reference(checkpoint_of("dense"), inputs_of("plain"))["logits"]
    assert 2 < logits.std() < 5
    assert not any((parameter == 0).all() for parameter in model.parameters())


# Generation


NEW_TOKENS = 18
GENERATED = ["dense", "tied biased odd heads bf16 files", "wrapped moe bf16 files", "moe interval 3 one by one tied"]
PROMPTS = inputs_of("both", tokens=110)


def rows_of(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [row[mask == 1] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]


@functools.cache
def greedy(directory: Path) -> list[list[int]]:
    """What transformers continues every row with, each alone."""
    model, found = reference_model(directory), []
    for row in rows_of(PROMPTS):
        ids = torch.from_numpy(row[None])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS, "do_sample": False}
        found.append(model.generate(ids, **options)[0, len(row) :].tolist())
    return found


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.slow_unless("*-torch", "moe interval 3 one by one tied-jax")
def test_greedy_tokens_of_a_ragged_batch_are_transformers_rows_alone(
    name: str, backend: str, checkpoint_of: Build
) -> None:
    want = greedy(checkpoint_of(name))
    assert len({token for row in want for token in row}) >= 8, f"a constant continuation shows little: {want}"
    model = loaded(backend, checkpoint_of(name))
    got = model.generate(**PROMPTS, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    assert np.asarray(got).tolist() == want


def as_numpy(value: Any) -> np.ndarray:
    return value.detach().numpy().copy() if isinstance(value, torch.Tensor) else np.asarray(value)


def layers_of(cache: Any) -> dict[str, dict[str, np.ndarray]]:
    layers = cache.arrays.layers if hasattr(cache, "arrays") else cache.layers
    return {name: {key: as_numpy(value) for key, value in parts.items()} for name, parts in layers.items()}


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.slow_unless("*-torch", "moe-jax")
def test_decoding_step_by_step_is_prefill(name: str, backend: str, checkpoint_of: Build) -> None:
    directory, ids_BT = checkpoint_of(name), inputs_of("plain", rows=2, tokens=70)["input_ids"]
    want = reference(directory, {"input_ids": ids_BT})["logits"]
    model = loaded(backend, directory)
    logits_BV, cache = model.prefill(ids_BT[:, :60], max_new_tokens=10)
    found = [as_numpy(logits_BV)]
    for step in range(60, 70):
        logits_BV, cache = model.decode(ids_BT[:, step], cache)
        found.append(as_numpy(logits_BV))
    got_BTV = np.stack(found, axis=1)
    assert relative_error(got_BTV, want[:, 59:]) <= BOUND
    _, whole = model.prefill(ids_BT, max_new_tokens=1)
    for layer, parts in layers_of(whole).items():
        for key, value in parts.items():
            if key in ("conv", "state"):
                assert relative_error(layers_of(cache)[layer][key], value) <= BOUND, (layer, key)


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("kind", ["left", "both"])
def test_padding_never_reaches_what_a_layer_keeps(kind: str, backend: str, checkpoint_of: Build) -> None:
    """Row by row and in the bits when other ids stand under the padding."""
    model, inputs = loaded(backend, checkpoint_of("dense")), inputs_of(kind, tokens=100)
    mask_BT = inputs["attention_mask"] == 1
    logits_BV, cache = model.prefill(**inputs)
    garbage = inputs | {"input_ids": np.where(mask_BT, inputs["input_ids"], 3)}
    assert garbage["input_ids"][0, 0] != FILL
    same_BV, other = model.prefill(**garbage)
    np.testing.assert_array_equal(as_numpy(same_BV), as_numpy(logits_BV))
    forward = [as_numpy(model(**batch))[mask_BT] for batch in (inputs, garbage)]
    np.testing.assert_array_equal(*forward)
    kept = layers_of(cache)
    for layer, parts in layers_of(other).items():
        for key in parts.keys() & {"conv", "state"}:
            np.testing.assert_array_equal(parts[key], kept[layer][key])
    for number, row in enumerate(rows_of(inputs)[:2]):
        alone_BV, cache = model.prefill(row[None])
        assert relative_error(as_numpy(logits_BV)[number], as_numpy(alone_BV)[0]) <= BOUND
        for layer, parts in layers_of(cache).items():
            for key in parts.keys() & {"conv", "state"}:
                assert relative_error(kept[layer][key][number], parts[key][0]) <= 1e-5, (layer, key, number)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_padding_in_the_middle_neither_fades_nor_writes_a_state(backend: str, checkpoint_of: Build) -> None:
    """Against the oracle: transformers would let the state fade there."""
    directory, inputs = checkpoint_of("dense"), inputs_of("plain")
    inputs["attention_mask"][:, 70:79] = 0
    found = oracle_errors(directory, inputs, ours(backend, directory, inputs))
    assert max(found.values()) <= BOUND, found


# Mistakes


def test_mistakes_are_seen(checkpoint_of: Build) -> None:
    """Each a plausible slip; ``-> what it does to the worst tensor``."""
    directory, inputs = checkpoint_of("dense"), inputs_of("left")
    want, is_real_BT = reference(directory, inputs), inputs["attention_mask"] == 1
    model = loaded("torch", directory)
    linear, attention = model.model.layers["1"].linear_attn, model.model.layers["0"].self_attn

    def worst() -> float:
        logits, taps = model.with_taps(**inputs)
        return max(errors({n: v.numpy() for n, v in {"logits": logits, **taps}.items()}, want, is_real_BT).values())

    assert worst() <= BOUND
    slips = [
        (linear.norm, "eps", 1e-4),
        (attention.q_norm, "eps", 1e-4),
        (attention, "q_norm", attention.k_norm),
        (linear.A_log, "data", linear.A_log.data + 1e-3),
        (linear.dt_bias, "data", linear.dt_bias.data.flip(0)),
        (linear.conv1d.weight, "data", linear.conv1d.weight.data.flip(2)),
    ]
    for owner, name, value in slips:
        before = getattr(owner, name)
        setattr(owner, name, value)
        assert worst() > 3 * BOUND, name
        setattr(owner, name, before)
    assert worst() <= BOUND


# bfloat16


TRACE_NAMES = {"embed_tokens": "hidden_states.0", "norm": "final_hidden_state", "logits": "logits"}


def oracle_errors(directory: Path, inputs: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> dict[str, float]:
    """Distance to the oracle under the very routing that ``got`` chose."""

    def number(name: str) -> int:
        return int(name.split(".layers.")[1].split(".")[0]) + 1

    gates = [name for name in got if name.endswith("gate")]
    routing = {f"routing.{number(name)}": got[name] for name in gates}
    want = oracle_forward(loaders.open_checkpoint(directory), **inputs, routing=routing)
    is_real_BT = inputs["attention_mask"] == 1
    return {
        name: relative_error(
            got[name][is_real_BT],
            want[TRACE_NAMES.get(name.split(".")[-1]) or f"hidden_states.{number(name)}"][is_real_BT],
        )
        for name in got
        if name not in gates
    }


@functools.cache
def peer_errors(directory: Path, dtype: torch.dtype) -> dict[str, float]:
    inputs = inputs_of("both")
    return oracle_errors(directory, inputs, reference(directory, inputs, dtype))


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.bfloat16])
def test_bfloat16_is_as_near_the_oracle_as_transformers(name: str, backend: str, checkpoint_of: Build) -> None:
    directory, inputs, limits = checkpoint_of(name), inputs_of("both"), LIMITS["bfloat16"]
    found = oracle_errors(directory, inputs, ours(backend, directory, inputs, "bfloat16"))
    peer = peer_errors(directory, torch.bfloat16)
    assert sorted(found) == sorted(peer)
    print("largest ratio", max(found[n] / max(peer[n], limits.u) for n in found), found["logits"], peer["logits"])
    over = {n: (e, peer[n]) for n, e in found.items() if e > limits.k * max(peer[n], limits.u)}
    assert not over


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("name", ["dense", "moe interval 3 one by one tied"])
def test_float32_is_as_near_the_oracle_as_transformers(name: str, backend: str, checkpoint_of: Build) -> None:
    directory, inputs = checkpoint_of(name), inputs_of("both")
    found = oracle_errors(directory, inputs, ours(backend, directory, inputs))
    peer = peer_errors(directory, torch.float32)
    print({n: f"{e:.1e} {peer[n]:.1e}" for n, e in found.items()})
    over = {n: (e, peer[n]) for n, e in found.items() if e > LIMITS["float32"].k * max(peer[n], LIMITS["float32"].u)}
    assert not over
