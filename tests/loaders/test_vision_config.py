"""config.json of models that see: every spelling in use, and what transformers does with odd towers."""

from __future__ import annotations

from typing import Any

import pytest
from test_config import GONE, changed, problems_of, read
from test_qwen3_5_config import CONFIG as HYBRID
from test_qwen3_5_config import wrapped

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 1], "mrope_interleaved": True}
TEXT: dict[str, Any] = {
    "model_type": "qwen3_vl_text",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": ROPE,
}
TOWER = {"depth": 3, "out_hidden_size": 8, "deepstack_visual_indexes": [0, 2]}
MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 6}


def seeing(text: dict[str, Any] = TEXT, vision: Any = TOWER, *, kind: str = "Qwen3VL", **outer: Any) -> dict[str, Any]:
    document = {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "image_token_id": 5,
        "video_token_id": 6,
        "text_config": text,
        "vision_config": vision,
    }
    return changed(document, **outer)


def test_a_config_that_sees_is_read_whole() -> None:
    config = read(seeing())
    assert config.layer_types == ("full_attention",) * 2
    assert config.rope_parameters.mrope_section == (1, 2, 1)
    assert config.vision.deepstack_visual_indexes == (0, 2)


@pytest.mark.parametrize(
    ("scaling", "section"),
    [
        ({"rope_type": "default", "mrope_section": [1, 2, 1], "mrope_interleaved": True}, (1, 2, 1)),
        ({"rope_type": "default", "mrope_section": [1, 2, 1]}, (1, 2, 1)),
        ({"type": "default", "rope_type": "default", "mrope_section": [1, 2, 1]}, (1, 2, 1)),
        ({"mrope_section": [1, 2, 1], "mrope_interleaved": None}, (1, 2, 1)),
        ({"rope_type": "default"}, (24, 20, 20)),
        ({"type": "default"}, (24, 20, 20)),
        ({}, (24, 20, 20)),
    ],
)
def test_version_4_spells_rotary_parameters_beside_their_theta(scaling: dict[str, Any], section: Any) -> None:
    config = read(seeing(changed(TEXT, rope_parameters=GONE, rope_theta=1e4, rope_scaling=scaling)))
    rope = config.rope_parameters
    assert (rope.rope_theta, rope.mrope_section, rope.mrope_interleaved) == (1e4, section, True)


def test_version_4_spells_the_part_that_turns_beside_them_too() -> None:
    scaling = {"rope_type": "default", "mrope_section": [1, 1, 0]}
    old = {"rope_theta": 1e4, "rope_scaling": scaling, "partial_rotary_factor": 0.5}
    new = {"rope_parameters": scaling | {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    assert read(changed(HYBRID, rope_parameters=GONE, **old)) == read(HYBRID | new)
    assert read(wrapped(changed(HYBRID, rope_parameters=GONE, **old))) == read(wrapped(HYBRID | new))


@pytest.mark.parametrize(
    "more",
    [
        {"rope_scaling": {key: value for key, value in ROPE.items() if key != "rope_theta"}, "rope_theta": 1e4},
        {"rope_scaling": ROPE},
        {"rope_scaling": {"type": "default", **{key: value for key, value in ROPE.items() if key != "rope_type"}}},
        {"rope_scaling": {}},
        {"rope_scaling": None},
    ],
)
def test_both_spellings_that_say_the_same_are_one(more: dict[str, Any]) -> None:
    assert read(seeing(TEXT | more)) == read(seeing())


@pytest.mark.parametrize("other", [{"mrope_section": [2, 1, 1]}, {"rope_theta": 2e4}, {"rope_type": "linear"}])
def test_two_spellings_that_disagree_are_one_problem(other: dict[str, Any]) -> None:
    (problem,) = problems_of(seeing(TEXT | {"rope_scaling": ROPE | other}))
    assert problem.endswith("disagree. Remove one.")


def test_rotary_parameters_that_cannot_be_read_are_one_problem() -> None:
    old = {"rope_theta": 1e4, "rope_scaling": {"rope_type": "mrope"}}
    (problem,) = problems_of(seeing(changed(TEXT, rope_parameters=GONE, **old)))
    assert "rope_type 'mrope' is not implemented" in problem
    (problem,) = problems_of(seeing(changed(TEXT, rope_parameters=GONE, rope_theta=1e4, rope_scaling=[1])))
    assert "rope_scaling is [1], expected an object" in problem


WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}


@pytest.mark.parametrize(("kind", "text"), [("Qwen3VL", TEXT), ("Qwen3VLMoe", TEXT | MOE)])
def test_no_layer_slides_whatever_is_said_of_a_window(kind: str, text: dict[str, Any]) -> None:
    assert read(seeing(text | WINDOW, kind=kind)) == read(seeing(text, kind=kind))
    assert [read(seeing(text | WINDOW, kind=kind)).window(layer) for layer in range(2)] == [None, None]
    full = {"layer_types": ["full_attention"] * 2}
    assert read(seeing(text | WINDOW | full, kind=kind)) == read(seeing(text, kind=kind))
    sliding = {"layer_types": ["full_attention", "sliding_attention"]}
    (problem,) = problems_of(seeing(text | WINDOW | sliding, kind=kind))
    assert problem.endswith("is not implemented, expected only full_attention")


def test_placeholders_that_are_not_said_are_the_familys() -> None:
    left_out = {"image_token_id": GONE, "video_token_id": None}
    vision = read(seeing(**left_out)).vision
    assert (vision.image_token_id, vision.video_token_id) == (151655, 151656)
    vision = read(wrapped(HYBRID, **left_out)).vision
    assert (vision.image_token_id, vision.video_token_id) == (248056, 248057)


def test_a_tower_that_cannot_be_read_is_not_called_missing() -> None:
    (problem,) = problems_of(seeing(vision=TOWER | {"depth": "3"}))
    assert "depth is '3', expected an integer" in problem
    (problem,) = problems_of(seeing(image_token_id="x"))
    assert "image_token_id is 'x', expected an integer" in problem
    (problem,) = problems_of(seeing(vision=None))
    assert "vision_config is missing" in problem


@pytest.mark.parametrize(
    ("indexes", "used"), [([8, 16, 24], 0), (GONE, 0), ([2, 0, 1], 3), ([0, 0, 1], 2), ([-1, 1, 9], 1), ([], 0)]
)
def test_deepstack_levels_of_no_block_are_held_and_not_counted(indexes: Any, used: int) -> None:
    vision = read(seeing(vision=changed(TOWER, deepstack_visual_indexes=indexes))).vision
    assert vision.deepstack_visual_indexes == ((8, 16, 24) if indexes is GONE else tuple(indexes))
    assert vision.num_levels == used


def test_qwen3_5_has_no_deepstack_whatever_is_said() -> None:
    outer = wrapped(HYBRID)["vision_config"] | {"deepstack_visual_indexes": [1]}
    assert read(wrapped(HYBRID, vision_config=outer)) == read(wrapped(HYBRID))


def test_the_learned_grid_is_the_largest_square_there_is() -> None:
    assert read(seeing(vision=TOWER | {"num_position_embeddings": 50})).vision.grid_side == 7


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 50}, {"rope_theta": 50}])
def test_a_towers_rotary_parameters_have_two_words_for_one_type(rope: dict[str, Any]) -> None:
    axial = {"rope_type": "axial", "rope_theta": 50.0}
    found = read(seeing(vision=TOWER | {"rope_parameters": rope}))
    assert (
        found
        == read(seeing(vision=TOWER | {"rope_parameters": axial}))
        == read(seeing(vision=TOWER | {"rope_theta": 50}))
    )
    assert found.vision.rope_theta == 50


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rope_parameters": {"rope_theta": 50, "factor": 4}}, "{'factor': 4, 'rope_theta': 50} is not implemented"),
        ({"rope_parameters": {"foo": 1}}, "rope_parameters {'foo': 1} is not implemented, expected rope_type 'axial'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters {'rope_type': 'yarn'} is not implemented"),
        ({"rope_parameters": {"rope_theta": 50}, "rope_theta": 60}, "rope_theta is 60 beside 50 in rope_parameters"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0.0, expected more than 1"),
        ({"rope_theta": -1}, "rope_theta is -1.0, expected more than 1"),
    ],
)
def test_rotary_parameters_a_tower_cannot_have_are_one_problem(changes: dict[str, Any], told: str) -> None:
    (problem,) = problems_of(seeing(vision=TOWER | changes))
    assert told in problem


@pytest.mark.parametrize("said", ["false", [0], 1])
def test_whether_a_checkpoint_is_text_alone_is_true_or_false(said: Any) -> None:
    (problem, *_) = problems_of(seeing(language_model_only=said))
    assert f"language_model_only is {said!r}, expected true or false" in problem


def test_a_towers_activation_is_one_of_a_few() -> None:
    for name in ("gelu", "gelu_pytorch_tanh", "relu", "silu"):
        assert read(seeing(vision=TOWER | {"hidden_act": name})).vision.hidden_act == name
    (problem,) = problems_of(seeing(vision=TOWER | {"hidden_act": "mish"}))
    assert "hidden_act 'mish' is not implemented. Known: gelu, gelu_pytorch_tanh, relu, silu" in problem


@pytest.mark.parametrize("said", [False, GONE])
def test_only_the_wrapper_says_whether_the_model_is_tied(said: Any) -> None:
    for make, text in ((seeing, TEXT), (wrapped, HYBRID)):
        config = read(make(text | {"tie_word_embeddings": True}, tie_word_embeddings=said))
        assert config.tie_word_embeddings is False
