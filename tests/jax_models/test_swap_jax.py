"""Embedding and head of a JAX model, swapped while it lives."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh
from small_checkpoints import EMBED, HEAD, IDS, D, Make, V, bits, random_table

import jax_models
from jax_models.weights import flatten


def test_a_swap_changes_two_leaves_and_shares_the_others(dense: jax_models.Model) -> None:
    embed, head = random_table(1), random_table(2)
    new = dense.set_embed_and_head(embed, head)
    assert (new.version, new.events[-1].kind, new.events[-1].ignored) == (dense.version + 1, "swap", ())
    old, now = flatten(dense.weights), flatten(new.weights)
    assert list(old) == list(now)
    assert {name for name in old if old[name] is not now[name]} == {EMBED, HEAD}
    assert (bits(now[EMBED]), bits(now[HEAD])) == (embed.tobytes(), head.tobytes())
    assert old[EMBED] is dense.get_embed_and_head()[0]
    assert dense.version == 1


def test_a_swap_changes_the_logits_and_swapping_back_restores_them(dense: jax_models.Model, tmp_path: Path) -> None:
    before = np.asarray(dense(IDS))
    new = dense.set_embed_and_head(random_table(1), random_table(2))
    assert np.abs(np.asarray(new(IDS)) - before).max() > 1
    assert bits(new(IDS)) == bits(jax_models.load(new.export(tmp_path / "a"))(IDS))
    back = new.set_embed_and_head(*dense.get_embed_and_head())
    assert back.version == 3
    assert bits(back(IDS)) == bits(dense(IDS)) == before.tobytes()
    assert back.digests() == dense.digests()


def test_none_leaves_a_half_alone(dense: jax_models.Model) -> None:
    embed, head = dense.get_embed_and_head()
    one = dense.set_embed_and_head(random_table(1), None)
    assert one.get_embed_and_head()[1] is head
    assert bits(one.get_embed_and_head()[0]) == random_table(1).tobytes()
    two = dense.set_embed_and_head(head=random_table(2))
    assert two.get_embed_and_head()[0] is embed
    assert bits(two.get_embed_and_head()[1]) == random_table(2).tobytes()


def test_setting_what_is_there_publishes_nothing(dense: jax_models.Model, tied: jax_models.Model) -> None:
    for model in (dense, tied):
        assert model.set_embed_and_head(*model.get_embed_and_head()) is model
        assert model.set_embed_and_head() is model


def test_a_swap_made_twice_is_the_swap_made_once(dense: jax_models.Model) -> None:
    once = dense.set_embed_and_head(random_table(1), random_table(2))
    twice = once.set_embed_and_head(random_table(1), random_table(2))
    assert twice.digests() == once.digests() != dense.digests()


def test_halves_may_be_handed_over_crosswise(dense: jax_models.Model) -> None:
    embed, head = dense.get_embed_and_head()
    new = dense.set_embed_and_head(head, embed)
    assert [bits(half) for half in new.get_embed_and_head()] == [bits(head), bits(embed)]
    assert new.set_embed_and_head(*reversed(new.get_embed_and_head())).digests() == dense.digests()


def test_a_numpy_buffer_may_be_overwritten_after_a_swap(dense: jax_models.Model) -> None:
    memory = np.empty(V * D * 4 + 64, np.uint8)
    start = -memory.ctypes.data % 64  # JAX on CPU aliases what is aligned so
    table = memory[start : start + V * D * 4].view(np.float32).reshape(V, D)
    table[...] = random_table(1)
    new = dense.set_embed_and_head(table, table)
    table[...] = 0
    assert [bits(half) for half in new.get_embed_and_head()] == [random_table(1).tobytes()] * 2


def test_no_kind_of_array_makes_a_swap_compile_anew(dense: jax_models.Model) -> None:
    dense(IDS)
    compiled = dense.programs.forward._cache_size()
    ones = np.ones((V, D), np.float32)
    weak = jax.lax.broadcast(1.0, (V, D))
    assert weak.weak_type
    for table in (ones, jnp.asarray(ones), jax.device_put(ones, jax.devices()[1]), weak):
        new = dense.set_embed_and_head(table, table)
        assert new.get_embed_and_head()[0].sharding == dense.get_embed_and_head()[0].sharding
        assert bits(new(IDS)) == bits(dense.set_embed_and_head(ones, ones)(IDS))
    assert dense.programs.forward._cache_size() == compiled


def test_every_misfit_of_a_swap_is_listed_and_nothing_changes(dense: jax_models.Model) -> None:
    before = flatten(dense.weights)
    with pytest.raises(ValueError, match="Nothing was changed") as caught:
        dense.set_embed_and_head(random_table(1).T, random_table(1, "float16"))
    assert "embed is float32 (40, 211), expected float32 (211, 40)" in str(caught.value)
    assert "head is float16 (211, 40), expected float32 (211, 40)" in str(caught.value)
    with pytest.raises(ValueError, match="embed is a list") as caught:
        dense.set_embed_and_head([[1.0]], random_table(1)[:-1])
    assert "head is float32 (210, 40)" in str(caught.value)
    assert all(flatten(dense.weights)[name] is value for name, value in before.items())
    assert dense.version == 1


def test_a_swap_in_a_bfloat16_model_takes_bfloat16(make: Make) -> None:
    model = jax_models.load(make(dtype="BF16"))
    with pytest.raises(ValueError, match="embed is float32"):
        model.set_embed_and_head(random_table(1))
    table = random_table(1).astype(ml_dtypes.bfloat16)
    assert bits(model.set_embed_and_head(table).get_embed_and_head()[0]) == table.tobytes()


def test_a_tied_model_takes_an_equal_head_and_refuses_another(tied: jax_models.Model) -> None:
    embed, head = tied.get_embed_and_head()
    assert embed is head
    assert tied.set_embed_and_head(head=np.asarray(embed).copy()) is tied
    for halves in ((None, random_table(1)), (random_table(1), random_table(2)), (random_table(1), embed)):
        with pytest.raises(ValueError, match="head must be the embedding or equal to it. Nothing was changed"):
            tied.set_embed_and_head(*halves)
    negative_zero = np.asarray(embed).copy()
    negative_zero[0, 0] = -0.0
    zero = negative_zero.copy()
    zero[0, 0] = 0.0
    with pytest.raises(ValueError, match="equal to it"):  # bits, not values
        tied.set_embed_and_head(zero, negative_zero)
    new = tied.set_embed_and_head(random_table(1), random_table(1))
    assert new.get_embed_and_head()[0] is new.get_embed_and_head()[1]
    assert bits(new.get_embed_and_head()[0]) == random_table(1).tobytes()
    assert sorted(flatten(new.weights)) == sorted(flatten(tied.weights))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_table_of_another_placement_is_copied_on_every_device(make: Make, order: tuple[int, int]) -> None:
    """device_put shares the shard of a device that has it already; given up, XLA would end the process."""
    mesh = Mesh(np.array(jax.devices())[list(order)], ("tensor",))
    model, giver = jax_models.load(make(), mesh=mesh), jax_models.load(make(seed=1))
    tables = giver.get_embed_and_head()
    theirs = {table.unsafe_buffer_pointer() for table in tables if table is not None}
    new = model.set_embed_and_head(*tables)
    shards = [
        shard.data for table in new.get_embed_and_head() if table is not None for shard in table.addressable_shards
    ]
    assert len(shards) == 4
    assert not {shard.unsafe_buffer_pointer() for shard in shards} & theirs
    before = np.asarray(new(IDS))
    giver.update_weights_from_disk(make(), donate=True)
    assert bits(new(IDS)) == before.tobytes()
