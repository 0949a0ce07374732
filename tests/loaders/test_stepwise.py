"""Rows cut for prefill and decode: what goes where, the way back, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from loaders import open_checkpoint
from loaders.host.multimodal import check_inputs
from loaders.host.stepwise import stepwise
from parity.zoo import make_checkpoint
from parity.zoo.pictures import pictures

IDS = np.arange(1, 22).reshape(3, 7)
MASK = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return open_checkpoint(make_checkpoint("qwen3", tmp_path_factory.mktemp("step") / "c")).config


def cut(config, ids=IDS, mask=MASK, position_ids=None, steps=2, **given):
    checked = check_inputs(config, ids, mask, position_ids, given=given)
    return stepwise(config, checked, ids, position_ids=position_ids, given=given, steps=steps)


def test_prompts_end_where_decoding_starts_whatever_side_is_padded(config):
    rows = cut(config)
    np.testing.assert_array_equal(rows.input_ids, [[1, 2, 3, 4, 5], [0, 0, 0, 8, 9], [0, 0, 17, 18, 19]])
    np.testing.assert_array_equal(rows.attention_mask, rows.input_ids > 0)
    np.testing.assert_array_equal(rows.token_NB, [[6, 10, 20], [7, 11, 21]])


def test_values_cut_and_joined_are_where_they_were(config):
    rows = cut(config)
    value = np.random.default_rng(0).normal(size=(3, 7, 2))
    parts = [part["path"] for part in rows.handed({"path": value})]
    assert [part.shape for part in parts] == [(3, 5, 2), (3, 1, 2), (3, 1, 2)]
    np.testing.assert_array_equal(parts[1][:, 0], value[[0, 1, 2], [5, 2, 5]])
    np.testing.assert_array_equal(rows.back(np.concatenate(parts, axis=1)), value)
    assert rows.handed(None) == [{}, {}, {}]


def test_all_that_cannot_be_decoded_is_one_error(config):
    with pytest.raises(
        ValueError, match=r"position_ids were given.*decode=4, expected 1 to 3: row 1 has 4 real tokens"
    ):
        cut(config, position_ids=np.zeros_like(IDS), steps=4)
    with pytest.raises(ValueError, match=r"decode=-1, expected 1 to 3"):
        cut(config, steps=-1)
    with pytest.raises(ValueError, match=r"cannot inject: a is \(3, 6\), expected \(3, 7, ...\); b is \(7,\)"):
        cut(config).handed({"a": np.zeros((3, 6)), "b": np.zeros(7), "c": np.zeros((3, 7))})


def test_images_stay_in_the_prompts(tmp_path):
    seen = open_checkpoint(make_checkpoint("qwen3_vl", tmp_path / "c")).config
    given = dict(pictures(seen, rows=3, tokens=96, padding="both"))
    ids, mask = given.pop("input_ids"), given.pop("attention_mask")
    rows = cut(seen, ids, mask, steps=8, **given)
    types = rows.multimodal["mm_token_type_ids"]
    assert types.shape == rows.input_ids.shape
    by_token = np.where(rows.input_ids == seen.vision.image_token_id, 1, 0)
    np.testing.assert_array_equal(types, np.where(rows.input_ids == seen.vision.video_token_id, 2, by_token))
    is_image = (ids == seen.vision.image_token_id).any(axis=1)
    late = int(mask[is_image][0].sum()) - 1
    with pytest.raises(ValueError, match=r"the last \d+ tokens of rows \[.*\] show something: only text is decoded"):
        cut(seen, ids[is_image][:1], mask[is_image][:1], steps=late, **_of_first(given, ids, is_image, seen))


def _of_first(given, ids, is_image, seen):
    """What the first row with an image shows."""
    row = int(np.flatnonzero(is_image)[0])
    assert row == 0, "the first row's images are the first"
    grid = given["image_grid_thw"]
    merged = grid.prod(axis=1) // seen.vision.spatial_merge_size**2
    count = int(np.searchsorted(merged.cumsum(), (ids[0] == seen.vision.image_token_id).sum())) + 1
    return {"image_grid_thw": grid[:count], "pixel_values": given["pixel_values"][: grid[:count].prod(axis=1).sum()]}
