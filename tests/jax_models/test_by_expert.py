"""Rows of experts that are elsewhere: a device leaves out as many as it can be sure of, whatever tokens choose."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from shape_suffixes import checked_shape_suffixes

import jax_models
from jax_models.layers import by_expert
from jax_models.layers.by_expert import of_those_here, weighed
from jax_models.sharding import MESH_AXES
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint, prompts
from parity.zoo.adapters import make_adapter

EXPERTS = {"vocab_size": 208, "num_experts": 8, "num_hidden_layers": 2}
MODELS = {
    "float": EXPERTS,
    "nvfp4": block_sizes("qwen3-moe") | EXPERTS | {"quantization": ZooQuantization(unify=False)},
    "nvfp4 weights": block_sizes("qwen3-moe") | EXPERTS | {"quantization": ZooQuantization(activations=False)},
}
TOLERANCE = 4e-6  # relative L2: float32 sums in another order


@pytest.fixture
def many(monkeypatch):
    """A few rows count as many, as those of a prefill do."""
    monkeypatch.setattr(by_expert, "_FEW_BYTES", 0)
    monkeypatch.setattr(by_expert, "TILE_ROWS", 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return functools.cache(lambda kind: make_checkpoint("qwen3-moe", tmp_path_factory.mktemp("it"), **MODELS[kind]))


@pytest.mark.parametrize("here", [0, 15, 16, 17, 32])
def test_a_device_runs_twice_its_share_of_rows_or_all_of_them(many, here):
    """Of 32 rows, four devices: 16 are enough for up to 16."""
    order_A, size_E = jnp.arange(32)[::-1], jnp.asarray([here // 2, here - here // 2], jnp.int32)
    given = (order_A, size_E, jnp.zeros((4, 4, 8)))
    run = jax.jit(lambda: of_those_here(lambda rows: jnp.zeros(32).at[: len(rows)].set(rows), *given, 4))
    expected = np.where(np.arange(32) < (16 if here <= 16 else 32), np.arange(32)[::-1], 0)
    np.testing.assert_array_equal(run(), expected)


def test_few_rows_and_experts_of_two_devices_have_one_program():
    def programs(tokens: int, parts: int) -> int:
        x_BTD, order_A = jax.ShapeDtypeStruct((1, tokens, 2048), jnp.bfloat16), jnp.arange(8 * tokens)
        run = lambda size_E: of_those_here(lambda rows: rows[0], order_A, size_E, x_BTD, parts)  # noqa: E731
        return str(jax.make_jaxpr(run)(jnp.zeros(4, jnp.int32))).count("cond[") + 1

    assert [programs(1024, 4), programs(2048, 4), programs(2048, 2), programs(2048, 1)] == [1, 2, 1, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("behind", [0, 5, None], ids=["none", "some", "all"])
@pytest.mark.parametrize("size", ["few", "many"])
def test_what_rows_of_strangers_came_out_as_is_not_summed(request, size, behind, dtype):
    """Tokens choose three of five experts, of which this device has all but the last two."""
    if size == "many":
        request.getfixturevalue("many")
    rng = np.random.default_rng(0)
    chosen_BTX = np.stack([rng.permutation(5)[:3] for _ in range(14)]).reshape(2, 7, 3)
    is_here_A = chosen_BTX.reshape(-1) < 3
    order_A = np.argsort(np.where(is_here_A, chosen_BTX.reshape(-1), 3), kind="stable")
    rows_BTXD = rng.standard_normal((2, 7, 3, 4)).astype(dtype)
    out = rows_BTXD.reshape(-1, 4)[order_A]
    out[is_here_A.sum() :] = np.nan
    out = out[: None if behind is None else is_here_A.sum() + behind]
    weights_BTX = rng.random((2, 7, 3), np.float32)
    found = weighed(*map(jnp.asarray, (out, order_A, is_here_A, weights_BTX)))
    expected = np.einsum("btxd,btx->btd", rows_BTXD.astype(float), weights_BTX * (chosen_BTX < 3))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda weights: weighed(*map(jnp.asarray, (out, order_A, is_here_A)), weights).sum())
    expected = rows_BTXD.astype(float).sum(-1) * (chosen_BTX < 3)
    np.testing.assert_allclose(gradient(jnp.asarray(weights_BTX)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", [False, True], ids=["", "adapter"])
@pytest.mark.parametrize("kind", MODELS)
def test_of_experts_on_four_devices_no_token_is_left_out(checkpoint, many, tmp_path, kind, adapter):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 4, 1), MESH_AXES)
    models = [jax_models.load(checkpoint(kind), mesh=where) for where in (mesh, None)]
    if adapter:
        made = make_adapter(checkpoint(kind), tmp_path / "adapter")
        models = [model.attach_lora(made, "a") for model in models]
    inputs = prompts(models[0].config, rows=4, tokens=24)
    real = inputs["attention_mask"].astype(bool)
    with checked_shape_suffixes("jax_models") as seen:
        found = [np.asarray(model(**inputs))[real] for model in models]
        # all scores alike: ties go to the first experts, which one device has
        models = [model.replace(weights=jax.tree.map_with_path(_indifferent, model.weights)) for model in models]
        crowded = [np.asarray(model(**inputs))[real] for model in models]
    assert "jax_models.layers.by_expert.of_those_here" in seen
    for logits, expected in (found, crowded):
        assert np.linalg.norm(logits - expected) < TOLERANCE * np.linalg.norm(expected)
    assert not np.allclose(*(logits for logits, _ in (found, crowded)))


def _indifferent(path: tuple, weight: jax.Array) -> jax.Array:
    return weight * 0 if "['mlp']['gate']" in jax.tree_util.keystr(path) else weight
