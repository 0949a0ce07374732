"""Embedding and head of a torch model, swapped while it lives."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from small_checkpoints import EMBED, HEAD, IDS, Make, random_table
from torch_bits import bits, copies

import torch_models
from torch_models.census import pointer_census
from torch_models.storage import host_view


def test_a_swap_writes_two_parameters_in_place(dense: torch_models.Model) -> None:
    before, census, owned = dense.digests(), pointer_census(dense), dense.get_embed_and_head()
    embed, head = random_table(1), torch.from_numpy(random_table(2))
    new = dense.set_embed_and_head(embed, head)
    assert new is dense
    assert (new.version, new.events[-1].kind, new.events[-1].ignored) == (2, "swap", ())
    assert pointer_census(new) == census
    assert {name for name, digest in new.digests().items() if digest != before[name]} == {EMBED, HEAD}
    assert all(half is same for half, same in zip(new.get_embed_and_head(), owned, strict=True))
    assert (bits(owned[0]), bits(owned[1])) == (embed.tobytes(), bits(head))


def test_a_swap_changes_the_logits_and_swapping_back_restores_them(dense: torch_models.Model, tmp_path: Path) -> None:
    before, digests, halves = dense(IDS), dense.digests(), copies(dense)
    dense.set_embed_and_head(random_table(1), random_table(2))
    assert (dense(IDS) - before).abs().max() > 1
    assert bits(dense(IDS)) == bits(torch_models.load(dense.export(tmp_path / "a"))(IDS))
    dense.set_embed_and_head(*halves)
    assert dense.version == 3
    assert bits(dense(IDS)) == bits(before)
    assert dense.digests() == digests


def test_none_leaves_a_half_alone(dense: torch_models.Model) -> None:
    _, head = copies(dense)
    dense.set_embed_and_head(random_table(1), None)
    assert [bits(half) for half in dense.get_embed_and_head()] == [random_table(1).tobytes(), bits(head)]
    dense.set_embed_and_head(head=random_table(2))
    assert [bits(half) for half in dense.get_embed_and_head()] == [random_table(s).tobytes() for s in (1, 2)]


def test_setting_what_is_there_publishes_nothing(dense: torch_models.Model, tied: torch_models.Model) -> None:
    for model in (dense, tied):
        assert model.set_embed_and_head(*model.get_embed_and_head()) is model
        model.set_embed_and_head()
        assert (model.version, len(model.events)) == (1, 1)


def test_a_swap_made_twice_is_the_swap_made_once(dense: torch_models.Model) -> None:
    before = dense.digests()
    once = dense.set_embed_and_head(random_table(1), random_table(2)).digests()
    assert dense.set_embed_and_head(random_table(1), random_table(2)).digests() == once != before


@pytest.mark.parametrize("hand_over", [lambda half: half, lambda half: half.data, lambda half: half.detach()[:]])
def test_halves_may_be_handed_over_crosswise(dense: torch_models.Model, hand_over) -> None:
    census, (embed, head) = pointer_census(dense), copies(dense)
    dense.set_embed_and_head(*(hand_over(half) for half in reversed(dense.get_embed_and_head())))
    assert [bits(half) for half in dense.get_embed_and_head()] == [bits(head), bits(embed)]
    assert pointer_census(dense) == census
    dense.set_embed_and_head(head=dense.get_embed_and_head()[0])
    assert [bits(half) for half in dense.get_embed_and_head()] == [bits(head), bits(head)]


def test_a_buffer_may_be_overwritten_after_a_swap(dense: torch_models.Model) -> None:
    embed, head = random_table(1), torch.from_numpy(random_table(2))
    dense.set_embed_and_head(embed, head)
    embed[...] = 0
    head.zero_()
    assert [bits(half) for half in dense.get_embed_and_head()] == [random_table(s).tobytes() for s in (1, 2)]


def test_a_table_that_is_not_contiguous_is_written_as_it_reads(dense: torch_models.Model) -> None:
    wide = np.ascontiguousarray(random_table(1).T)
    dense.set_embed_and_head(wide.T, torch.from_numpy(wide).T)
    assert [bits(half) for half in dense.get_embed_and_head()] == [random_table(1).tobytes()] * 2


def test_every_misfit_of_a_swap_is_listed_and_nothing_changes(dense: torch_models.Model) -> None:
    before, census = dense.digests(), pointer_census(dense)
    with pytest.raises(ValueError, match="Nothing was changed") as caught:
        dense.set_embed_and_head(random_table(1).T, torch.from_numpy(random_table(1, "float16")))
    assert "embed is float32 (40, 211), expected float32 (211, 40)" in str(caught.value)
    assert "head is float16 (211, 40), expected float32 (211, 40)" in str(caught.value)
    with pytest.raises(ValueError, match="embed is a list") as caught:
        dense.set_embed_and_head([[1.0]], random_table(1)[:-1])
    assert "head is float32 (210, 40)" in str(caught.value)
    with pytest.raises(ValueError, match="head is float64"):  # a good half is not written either
        dense.set_embed_and_head(random_table(1), random_table(1, "float64"))
    assert (dense.digests(), pointer_census(dense), dense.version) == (before, census, 1)


def test_a_swap_in_a_bfloat16_model_takes_bfloat16(make: Make) -> None:
    model = torch_models.load(make(dtype="BF16"))
    with pytest.raises(ValueError, match="embed is float32"):
        model.set_embed_and_head(random_table(1))
    table = random_table(1).astype(ml_dtypes.bfloat16)
    assert bits(model.set_embed_and_head(table).get_embed_and_head()[0]) == table.tobytes()
    other = torch.from_numpy(random_table(2)).bfloat16()
    assert bits(model.set_embed_and_head(head=other).get_embed_and_head()[1]) == bits(other)


def test_a_tied_model_takes_an_equal_head_and_refuses_another(tied: torch_models.Model) -> None:
    embed, head = tied.get_embed_and_head()
    assert embed is head
    before, census = tied.digests(), pointer_census(tied)
    tied.set_embed_and_head(head=embed.detach().clone())
    tied.set_embed_and_head(head=host_view(embed).copy())
    for halves in ((None, random_table(1)), (random_table(1), random_table(2)), (random_table(1), embed)):
        with pytest.raises(ValueError, match="head must be the embedding or equal to it. Nothing was changed"):
            tied.set_embed_and_head(*halves)
    zero = host_view(embed).copy()
    zero[0, 0] = 0.0
    negative_zero = zero.copy()
    negative_zero[0, 0] = -0.0
    with pytest.raises(ValueError, match="equal to it"):  # bits, not values
        tied.set_embed_and_head(zero, negative_zero)
    assert (tied.digests(), tied.version) == (before, 1)
    tied.set_embed_and_head(random_table(1), random_table(1))
    assert tied.get_embed_and_head()[0] is tied.get_embed_and_head()[1] is embed
    assert (bits(embed), tied.version, pointer_census(tied)) == (random_table(1).tobytes(), 2, census)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
