"""Stages of a pipeline in torch: each its part, and together the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_checkpoints import IDS, D, Make, random_table, tensors_of
from torch_bits import bits

import torch_models
from torch_models.census import pointer_census
from torch_models.weights import parameters


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["qwen3", "qwen3-tied"])
def test_chained_stages_are_the_whole_model(make: Make, name: str, count: int) -> None:
    whole = torch_models.load(make(name))
    stages = [torch_models.load(make(name), stage=(index, count)) for index in range(count)]
    mask_BT = np.ones_like(IDS)
    mask_BT[1, :3] = 0
    x = stages[0](IDS, mask_BT)
    assert x.shape == (*IDS.shape, D)
    for stage in stages[1:]:
        x = stage(attention_mask=mask_BT, hidden_states=x)
    want = whole(IDS, mask_BT)
    real_BT = torch.from_numpy(mask_BT == 1)
    error = float((x - want)[real_BT].norm() / want[real_BT].norm())
    assert error == 0  # the same sums
    held = [name for stage in stages for name in parameters(stage)]
    assert set(held) == set(parameters(whole))
    for stage in stages:
        assert all(bits(v) == bits(parameters(whole)[n]) for n, v in parameters(stage).items())


def halves_of(model: torch_models.Model) -> tuple[bool, bool]:
    embed, head = model.get_embed_and_head()
    return embed is not None, head is not None


@pytest.mark.parametrize(
    ("name", "count", "want"),
    [
        ("qwen3", 2, [(True, False), (False, True)]),
        ("qwen3", 3, [(True, False), (False, False), (False, True)]),
        ("qwen3-tied", 2, [(True, True), (True, True)]),
        ("qwen3-tied", 3, [(True, True), (False, False), (True, True)]),
    ],
)
def test_a_stage_has_its_own_halves_and_ignores_the_others_by_name(
    make: Make, name: str, count: int, want: list[tuple[bool, bool]]
) -> None:
    for index, has in enumerate(want):
        model = torch_models.load(make(name), stage=(index, count))
        assert halves_of(model) == has
        names, census = set(dict(model.named_parameters(remove_duplicate=False))), pointer_census(model)
        given = (random_table(1), random_table(1 if "tied" in name else 2))
        new = model.set_embed_and_head(*given)
        ignored = tuple(half for half, own in zip(("embed", "head"), has, strict=True) if not own)
        assert new.version == (2 if any(has) else 1)
        assert new.events[1:][-1].ignored == ignored
        assert set(dict(new.named_parameters(remove_duplicate=False))) == names
        assert pointer_census(new) == census
        for half, own, value in zip(new.get_embed_and_head(), has, given, strict=True):
            assert (half is not None) == own
            assert not own or bits(half) == value.tobytes()


def test_a_stage_reloads_and_exports_its_part(make: Make, tmp_path: Path) -> None:
    sources = [make(), make(seed=1)]
    whole = {name: value for file in tensors_of(sources[1]).values() for name, value in file.items()}
    found: dict[str, tuple] = {}
    for index in range(2):
        stage = torch_models.load(sources[0], stage=(index, 2)).update_weights_from_disk(sources[1])
        for file in tensors_of(stage.export(tmp_path / str(index))).values():
            assert not set(file) & set(found)
            found |= file
    assert found == whole


def test_a_stage_takes_what_is_its_own(make: Make) -> None:
    first, last = (torch_models.load(make(), stage=(index, 2)) for index in range(2))
    with pytest.raises(ValueError, match="this stage is the first of the pipeline: give input_ids"):
        first(hidden_states=np.zeros((1, 2, D)))
    with pytest.raises(ValueError, match="stage 1 of 2 takes hidden_states, not input_ids"):
        last(IDS)
    with pytest.raises(ValueError, match=r"expected \[B, T, 40\]"):
        last(hidden_states=np.zeros((1, 2, D + 1), np.float32))
    with pytest.raises(ValueError, match="this takes the whole model, and this is stage 0 of 2"):
        first.generate(IDS)
    for stage in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="must be"):
            torch_models.load(make(), stage=stage)
    with pytest.raises(ValueError, match="4 pipeline stages for 3 decoder layers"):
        torch_models.load(make(), stage=(0, 4))
