"""Images and videos matched to their placeholders: positions, slots, and everything that can be wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from loaders.config import config_from_json
from loaders.host.multimodal import check_inputs, check_shown, rope_index
from loaders.host.vision_grid import Grid
from parity.zoo import zoo_config
from parity.zoo.pictures import pictures

CONFIG, _ = config_from_json(zoo_config("qwen3_vl"))
assert CONFIG is not None
TOWER = CONFIG.vision
IMAGE, VIDEO = TOWER.image_token_id, TOWER.video_token_id


def pixels(*grids: tuple[int, int, int]) -> np.ndarray:
    return np.zeros((sum(int(np.prod(grid)) for grid in grids), TOWER.patch_numbers), np.float32)


def one_image(ids, grid=(1, 2, 4), **more):
    return {"pixel_values": pixels(grid), "image_grid_thw": np.array([grid]), **more}, np.array([ids])


@pytest.fixture(scope="module")
def reference():
    """transformers' own, of the same sizes; only its arithmetic on integers is used."""
    vision = {"spatial_merge_size": TOWER.spatial_merge_size, "depth": 1, "deepstack_visual_indexes": [0]}
    text = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 8, "intermediate_size": 8}
    config = Qwen3VLConfig(vision_config=vision | {"hidden_size": 8, "num_heads": 1}, text_config=text)
    with torch.device("meta"):
        return Qwen3VLModel(config)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_positions_and_deltas_are_those_of_transformers(reference, padding):
    batch = pictures(CONFIG, padding=padding, rows=6)
    expected, deltas = reference.get_rope_index(
        torch.from_numpy(batch["input_ids"]),
        torch.from_numpy(batch["mm_token_type_ids"]),
        torch.from_numpy(batch["image_grid_thw"]),
        torch.from_numpy(batch["video_grid_thw"]),
        torch.from_numpy(batch["attention_mask"]),
    )
    ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
    positions, delta_B = rope_index(CONFIG, ids, mask, given=batch)
    np.testing.assert_array_equal(positions, expected.numpy())
    np.testing.assert_array_equal(delta_B, deltas.numpy()[:, 0])


def test_an_image_takes_fewer_positions_than_tokens_and_the_text_goes_on_beyond_its_longer_side():
    given, ids = one_image([5, IMAGE, IMAGE, 6, 7])  # one row of two tokens
    positions, delta_B = rope_index(CONFIG, ids, None, given=given)
    assert positions[:, 0].tolist() == [[0, 1, 1, 3, 4], [0, 1, 1, 3, 4], [0, 1, 2, 3, 4]]
    assert delta_B.tolist() == [0]
    given, ids = one_image([5, *[IMAGE] * 4, 6], grid=(1, 4, 4))
    positions, delta_B = rope_index(CONFIG, ids, None, given=given)
    assert positions[:, 0].tolist() == [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]
    assert delta_B.tolist() == [-2]


def test_two_images_without_a_word_between_are_two_images():
    grids = [(1, 2, 2), (1, 2, 4)]
    given = {"pixel_values": pixels(*grids), "image_grid_thw": np.array(grids)}
    positions, _ = rope_index(CONFIG, np.array([[IMAGE] * 3 + [9]]), None, given=given)
    assert positions[:, 0].tolist() == [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]


def test_padding_is_passed_over_and_a_row_of_text_alone_counts_as_ever():
    given, _ = one_image([])
    ids = np.array([[7, 7, 5, IMAGE, IMAGE, 6], [1, 2, 3, 4, 5, 6]])
    mask = np.array([[0, 0, 1, 1, 1, 1], [1] * 6])
    checked = check_inputs(CONFIG, ids, mask, given=given)
    assert checked.position_ids[2].tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert checked.vision.slot_BT.tolist() == [[-1, -1, -1, 0, 1, -1], [-1] * 6]


def test_a_prompt_is_moved_to_its_end_with_what_it_shows():
    given, _ = one_image([])
    ids, mask = np.array([[5, IMAGE, IMAGE, 6, 0, 0]]), np.array([[1, 1, 1, 1, 0, 0]])
    checked = check_inputs(CONFIG, ids, mask, given=given, is_prompt=True).padded_to(8)
    assert checked.vision.slot_BT.tolist() == [[-1, -1, -1, -1, -1, 0, 1, -1]]
    assert checked.position_ids[2].tolist() == [[0, 0, 0, 0, 0, 1, 2, 3]]
    assert checked.attention_mask.tolist() == [[False] * 4 + [True] * 4]


def test_slots_of_videos_come_after_those_of_images_whatever_comes_first_in_the_prompt():
    given, ids = one_image([VIDEO, 3, IMAGE, IMAGE])
    given |= {"pixel_values_videos": pixels((1, 2, 2)), "video_grid_thw": np.array([[1, 2, 2]])}
    checked = check_inputs(CONFIG, ids, None, given=given)
    assert checked.vision.slot_BT.tolist() == [[2, -1, 0, 1]]
    assert checked.vision.patches.frames == (8, 4)


def test_a_placeholder_may_be_any_number_where_the_types_say_so():
    given, ids = one_image([5, 10**9, 10**9 + 1, 6], mm_token_type_ids=np.array([[0, 1, 1, 0]]))
    checked = check_inputs(CONFIG, ids, None, given=given)
    assert checked.input_ids.tolist() == [[5, CONFIG.vocab_size - 1, CONFIG.vocab_size - 1, 6]]
    assert checked.vision.slot_BT.tolist() == [[-1, 0, 1, -1]]


def test_a_placeholders_number_is_text_where_the_types_say_so():
    given, ids = one_image([VIDEO, IMAGE, IMAGE, IMAGE], mm_token_type_ids=np.array([[0, 1, 1, 0]]))
    checked = check_inputs(CONFIG, ids, None, given=given)
    assert checked.input_ids.tolist() == [[VIDEO, IMAGE, IMAGE, IMAGE]]
    assert checked.vision.slot_BT.tolist() == [[-1, 0, 1, -1]]
    assert checked.position_ids[:, 0].tolist() == [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]


def test_positions_that_are_given_are_taken():
    given, ids = one_image([5, IMAGE, IMAGE, 6])
    positions = np.arange(12).reshape(3, 1, 4)
    assert check_inputs(CONFIG, ids, None, positions, given=given).position_ids.tolist() == positions.tolist()


def test_of_four_rows_of_positions_the_first_is_of_text_and_left_out():
    given, ids = one_image([5, IMAGE, IMAGE, 6])
    positions = np.arange(16).reshape(4, 1, 4)
    for shown in (given, {}):
        checked = check_inputs(CONFIG, ids, None, positions, given=shown)
        assert checked.position_ids.tolist() == positions[1:].tolist()
    with pytest.raises(ValueError, match="position_ids is int64"):
        check_inputs(CONFIG, ids, None, np.zeros((5, 1, 4), int), given=given)


def test_patches_lie_token_by_token_as_in_transformers():
    grids = [Grid(1, 4, 6), Grid(2, 2, 8), Grid(1, 2, 2)]
    grid_thw = torch.tensor([grid.size for grid in grids])
    patches = check_shown(TOWER, pixels(*(grid.size for grid in grids)), grid_thw.numpy())
    places = get_vision_position_ids(grid_thw, TOWER.spatial_merge_size).numpy()
    np.testing.assert_array_equal(patches.place_A2, places)
    taps, shares = get_vision_interpolation_indices_and_weights(
        grid_thw, TOWER.grid_side, align_corners=True, spatial_merge_size=TOWER.spatial_merge_size
    )
    np.testing.assert_array_equal(patches.tap_A4, taps.numpy())
    np.testing.assert_array_equal(patches.share_A4, shares.numpy())
    assert patches.frames == (24, 16, 16, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_grid_thw": None}, "image_grid_thw is missing beside pixel_values"),
        ({"pixel_values": None}, "pixel_values is missing beside image_grid_thw"),
        ({"image_grid_thw": np.array([[1, 3, 4]])}, "multiples of spatial_merge_size=2"),
        ({"image_grid_thw": np.array([[1, 0, 4]])}, "integers of 1 and more"),
        ({"image_grid_thw": np.array([1, 2, 4])}, r"\[images, 3\]"),
        ({"image_grid_thw": np.array([[1.0, 2.0, 4.0]])}, "expected integers"),
        ({"pixel_values": pixels((1, 2, 2))}, r"expected floats \(8, 96\)"),
        ({"pixel_values": pixels((1, 2, 4)).astype(np.int32)}, "expected floats"),
        ({"pixel_values": pixels((1, 2, 2)), "image_grid_thw": np.array([[1, 2, 2]])}, "2 image placeholders, but"),
        ({"mm_token_type_ids": np.array([[0, 2, 2, 0]])}, "disagrees with input_ids at 2 tokens"),
        ({"mm_token_type_ids": np.array([[0, 3, 1, 0]])}, "expected 0"),
        ({"mm_token_type_ids": np.array([0, 1, 1, 0])}, "expected 0"),
    ],
)
def test_what_does_not_fit_is_said(change, words):
    given, ids = one_image([5, IMAGE, IMAGE, 6])
    with pytest.raises(ValueError, match=words):
        check_inputs(CONFIG, ids, None, given=given | change)


def test_everything_wrong_is_said_at_once():
    given, ids = one_image([5, IMAGE, IMAGE, 6], grid=(1, 3, 4))
    given |= {"pixel_values_videos": pixels((1, 2, 2)), "mm_token_type_ids": np.array([[0, 2, 1, 0]])}
    with pytest.raises(ValueError, match="spatial_merge_size") as caught:
        check_inputs(CONFIG, ids, None, given=given)
    assert "video_grid_thw is missing" in str(caught.value)
    assert "disagrees" in str(caught.value)


def test_an_image_torn_apart_by_text_is_refused():
    given, ids = one_image([IMAGE, 5, IMAGE])
    with pytest.raises(ValueError, match="needs 2 placeholders in a row from token 0"):
        check_inputs(CONFIG, ids, None, given=given)


def test_placeholders_without_anything_to_fill_them_are_refused_where_types_are_given():
    with pytest.raises(ValueError, match="1 image placeholders, but image_grid_thw makes 0"):
        check_inputs(CONFIG, [[5, IMAGE]], None, given={"mm_token_type_ids": [[0, 1]]})


def test_types_of_text_alone_are_text():
    checked = check_inputs(CONFIG, [[5, 6]], None, given={"mm_token_type_ids": [[0, 0]]})
    assert checked.vision is None
    assert checked.position_ids.tolist() == [[0, 1]]


TEXT_ALONE = {"mm_token_type_ids": np.zeros((1, 2), int), "pixel_values": None, "image_grid_thw": None}


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, vision=None)])
@pytest.mark.parametrize("has_tower", [True, False])
@pytest.mark.parametrize("is_prompt", [True, False])
def test_a_processors_text_shows_nothing_to_any_model(config, has_tower, is_prompt):
    options = {"has_tower": has_tower, "is_prompt": is_prompt}
    checked = check_inputs(config, [[5, IMAGE]], None, given=TEXT_ALONE, **options)
    assert checked.vision is None
    assert checked.input_ids.tolist() == [[5, IMAGE]]


def test_types_that_are_no_types_of_these_tokens_are_not_passed_over():
    text = dataclasses.replace(CONFIG, vision=None)
    for types in ([[0, 0, 0]], [[0.0, 0.0]], [[0, 1]]):
        with pytest.raises(ValueError, match="has no vision tower"):
            check_inputs(text, [[5, 6]], None, given={"mm_token_type_ids": types})
        with pytest.raises(ValueError, match="mm_token_type_ids is|1 image placeholders"):
            check_inputs(CONFIG, [[5, 6]], None, given={"mm_token_type_ids": types})


NO_IMAGES = {"pixel_values": pixels(), "image_grid_thw": np.zeros((0, 3), int)}


def test_no_images_at_all_show_nothing():
    checked = check_inputs(CONFIG, [[5, 6]], None, given=NO_IMAGES)
    assert checked.vision is None
    given, ids = one_image([5, VIDEO, VIDEO])
    videos = {"pixel_values_videos": given["pixel_values"], "video_grid_thw": given["image_grid_thw"]}
    assert check_inputs(CONFIG, ids, None, given=NO_IMAGES | videos).vision.slot_BT.tolist() == [[-1, 0, 1]]
    with pytest.raises(ValueError, match="1 image placeholders, but image_grid_thw makes 0"):
        check_inputs(CONFIG, [[5, IMAGE]], None, given=NO_IMAGES)
    with pytest.raises(ValueError, match="grid_thw holds no image"):
        check_shown(TOWER, *NO_IMAGES.values())


def test_pixels_that_numpy_cannot_read_are_named():
    given, ids = one_image([5, IMAGE, IMAGE, 6])
    given["pixel_values"] = torch.from_numpy(given["pixel_values"]).bfloat16()
    with pytest.raises(ValueError, match="pixel_values is a Tensor, which NumPy cannot read"):
        check_inputs(CONFIG, ids, None, given=given)


def test_a_model_that_sees_nothing_says_so():
    given, ids = one_image([5, IMAGE, IMAGE, 6])
    with pytest.raises(ValueError, match="the vision tower is not held here"):
        check_inputs(CONFIG, ids, None, given=given, has_tower=False)
    text = dataclasses.replace(CONFIG, vision=None)
    with pytest.raises(ValueError, match="has no vision tower"):
        check_inputs(text, ids, None, given=given)


def test_an_unknown_input_is_a_type_error():
    with pytest.raises(TypeError, match="pixels"):
        check_inputs(CONFIG, [[5]], None, given={"pixels": 1})


def test_positions_of_text_alone_are_not_asked_for():
    with pytest.raises(ValueError, match="nothing is shown"):
        rope_index(CONFIG, [[5]], None, given={})
