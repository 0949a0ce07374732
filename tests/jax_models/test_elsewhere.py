"""What lies on other devices than a model's is brought there, and a reload goes where the weights are."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import jax_models
from parity.zoo import make_checkpoint, prompts
from parity.zoo.draft import make_drafting_checkpoint

pytestmark = pytest.mark.usefixtures("eight_devices")

TWO = {"num_hidden_layers": 2, "vocab_size": 208, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("elsewhere")
    return [make_checkpoint("qwen3", root / str(seed), seed=seed, **TWO) for seed in range(2)]


@pytest.fixture(scope="module")
def batch(pair):
    return prompts(jax_models.load(pair[0]).config, rows=2, tokens=12)


@pytest.mark.parametrize("donate", [False, True])
def test_a_reload_goes_where_the_weights_are_whatever_the_default_device_is_by_then(donate, pair, batch):
    with jax.default_device(jax.devices()[3]):
        model = jax_models.load(pair[0])
    updated = model.update_weights_from_disk(pair[1], donate=donate)
    assert {leaf.devices().pop() for leaf in jax.tree.leaves(updated.weights)} == {jax.devices()[3]}
    assert updated.digests() == jax_models.load(pair[1]).digests()
    np.testing.assert_array_equal(updated(**batch), jax_models.load(pair[1])(**batch))


def test_stages_on_the_same_devices_in_another_order_hand_on(pair, batch):
    devices = np.array(jax.devices()[:2])
    expected = jax_models.load(pair[0])(**batch)
    first = jax_models.load(pair[0], mesh=Mesh(devices, ("tensor",)), stage=(0, 2))
    for order in (devices, devices[::-1], np.array(jax.devices()[2:4])):
        last = jax_models.load(pair[0], mesh=Mesh(order, ("tensor",)), stage=(1, 2))
        found = last(attention_mask=batch["attention_mask"], hidden_states=first(**batch))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decode", [0, 2])
def test_values_of_another_model_are_injected_wherever_they_lie(decode, pair, batch):
    devices = np.array(jax.devices()[:2])
    models = [
        jax_models.load(pair[0]),
        jax_models.load(pair[0], mesh=Mesh(devices, ("tensor",))),
        jax_models.load(pair[0], mesh=Mesh(devices[::-1], ("tensor",))),
    ]
    for giver in models:
        expected, taps = giver.with_taps(**batch, decode=decode)
        for taker in models:
            given = {"model.layers.1": taps["model.layers.1"]}
            logits, _ = taker.with_taps(**batch, inject=given, decode=decode)
            np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_draft_of_weights_that_were_given_up_says_so(tmp_path):
    path = make_drafting_checkpoint(
        "qwen3_5", tmp_path / "it", num_hidden_layers=2, layer_types=["linear_attention"] * 2
    )
    model = jax_models.load(path, mtp=True)
    draft, ids = model.draft, [[3, 14, 15]]
    updated = model.update_weights_from_disk(path, donate=True)
    for call in (
        lambda: model.mtp_forward(ids),
        lambda: draft(ids),
        lambda: draft.bind(updated)(ids),
        lambda: updated.generate(ids, draft=draft.bind(updated)),
    ):
        with pytest.raises(RuntimeError, match="were given up to an update"):
            call()
    assert updated.mtp_forward(ids)[0].shape[:2] == (1, 2)


def test_a_mesh_has_every_device_once(pair):
    twice = Mesh(np.array(jax.devices()[:1] * 2), ("tensor",))
    with pytest.raises(ValueError, match="the mesh has 2 places for 1 devices, expected each once"):
        jax_models.load(pair[0], mesh=twice)
