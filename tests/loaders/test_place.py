"""One tensor into its place: ids by keyword, fused experts either way round, the experts of one rank."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from loaders.reading.place import load_fused_expert_weights, place_of, weight_loader
from loaders.spec import ParamSpec, Placement

E, M, D = 3, 6, 8


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(ml_dtypes.bfloat16)


def spec_of(shape: tuple[int, ...], tensor_shape: tuple[int, ...], *, is_transposed: bool) -> ParamSpec:
    return ParamSpec("p", shape, (), (Placement("t"),), tensor_shape, is_transposed=is_transposed)


def test_a_place_is_a_view_in_the_tensors_own_shape() -> None:
    param = numbered(E, 2, M, D)
    plain = place_of(param, spec_of(param.shape, (E, 2 * M, D), is_transposed=False), Placement("t"))
    turned = place_of(param, spec_of(param.shape, (E, D, 2 * M), is_transposed=True), Placement("t"))
    assert (plain.shape, turned.shape) == ((E, 2 * M, D), (E, D, 2 * M))
    assert np.shares_memory(plain, param)
    assert np.shares_memory(turned, param)
    np.testing.assert_array_equal(turned[1, 5], param[1, :, :, 5].reshape(-1))  # gate, then up


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_fused_experts_are_written_one_by_one_gate_first(num_shards: int, is_transposed: bool) -> None:
    stored = numbered(E, num_shards * M, D)
    expected = np.stack(np.split(stored, num_shards, axis=1), axis=1) if num_shards > 1 else stored
    param = np.zeros_like(expected)
    given = np.ascontiguousarray(stored.transpose(0, 2, 1)) if is_transposed else stored
    assert load_fused_expert_weights(param, given, num_shards=num_shards) is None
    np.testing.assert_array_equal(param, expected)
    np.testing.assert_array_equal(param.reshape(stored.shape), stored)  # so it may be read straight into place


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_square_tensor_is_written_as_it_is_said_to_be(is_transposed: bool) -> None:
    stored = numbered(E, 2 * M, 2 * M)
    param = np.zeros((E, 2, M, 2 * M), stored.dtype)
    with pytest.raises(ValueError, match="fits both ways. Say is_transposed"):
        load_fused_expert_weights(param, stored, num_shards=2)
    assert not param.any()
    load_fused_expert_weights(param, stored, num_shards=2, is_transposed=is_transposed)
    expected = stored.transpose(0, 2, 1) if is_transposed else stored
    np.testing.assert_array_equal(param.reshape(stored.shape), expected)


@pytest.mark.parametrize(
    ("model_type", "is_transposed"),
    [("qwen3_vl_moe", True), ("qwen3_vl_moe_text", True), ("qwen3_5_moe", False), ("qwen3_5_moe_text", False)],
)
def test_a_square_tensor_is_as_its_family_is_published(model_type: str, is_transposed: bool) -> None:
    stored = numbered(E, 2 * M, 2 * M)
    param = np.zeros((E, 2, M, 2 * M), stored.dtype)
    load_fused_expert_weights(param, stored, num_shards=2, model_type=model_type)
    expected = stored.transpose(0, 2, 1) if is_transposed else stored
    np.testing.assert_array_equal(param.reshape(stored.shape), expected)
    load_fused_expert_weights(param, stored, num_shards=2, model_type=model_type, is_transposed=not is_transposed)
    np.testing.assert_array_equal(param.reshape(stored.shape), expected.transpose(0, 2, 1))  # what is said goes first


def test_a_family_without_fused_experts_or_one_nobody_knows_breaks_no_tie() -> None:
    param, stored = np.zeros((E, 2, M, 2 * M)), np.zeros((E, 2 * M, 2 * M))
    with pytest.raises(ValueError, match="fits both ways. Say is_transposed"):
        load_fused_expert_weights(param, stored, num_shards=2, model_type="qwen3_moe")
    with pytest.raises(ValueError, match="model_type is 'mixtral', expected that of Qwen3ForCausalLM"):
        load_fused_expert_weights(param, stored, num_shards=2, model_type="mixtral")


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_a_shape_that_fits_one_way_is_read_that_way_whatever_the_family(model_type: str) -> None:
    stored = numbered(E, 2 * M, D)
    for given in (stored, np.ascontiguousarray(stored.transpose(0, 2, 1))):
        param = np.zeros((E, 2, M, D), stored.dtype)
        load_fused_expert_weights(param, given, num_shards=2, model_type=model_type)
        np.testing.assert_array_equal(param.reshape(stored.shape), stored)


def test_what_already_lies_in_its_place_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(array: np.ndarray) -> np.ndarray:
        raise AssertionError("it was copied")

    monkeypatch.setattr("loaders.reading.place.bits", forbidden)
    param = numbered(E, 2, M, D)
    load_fused_expert_weights(param, param.reshape(E, 2 * M, D), num_shards=2)
    load_fused_expert_weights(param, param.reshape(E, 2 * M, D).swapaxes(1, 2), num_shards=2)
    weight_loader(param, param[1, 1], shard_id=1, expert_id=1)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(numbered(2, 12, 8), id="an expert less"),
        pytest.param(numbered(4, 12, 8), id="an expert more"),
        pytest.param(numbered(3, 11, 8), id="odd"),
        pytest.param(numbered(3, 12, 7), id="other width"),
        pytest.param(numbered(3, 7, 12), id="other width, transposed"),
        pytest.param(numbered(3, 12, 8).astype(np.float32), id="other dtype"),
        pytest.param(numbered(3, 96), id="flat"),
    ],
)
def test_fused_experts_of_another_kind_are_refused_untouched(given: np.ndarray) -> None:
    param = np.zeros((E, 2, M, D), ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match=r"expected bfloat16 \(12, 8\) or \(8, 12\) for experts 0 to 2"):
        load_fused_expert_weights(param, given, num_shards=2)
    assert not param.any()


def test_a_parameter_without_an_axis_of_shards_holds_one() -> None:
    with pytest.raises(ValueError, match="in 2 parts"):
        load_fused_expert_weights(np.zeros((E, 2 * M, D)), np.zeros((E, 4 * M, D)), num_shards=2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: load_fused_expert_weights(np.zeros((3, 2, 6, 8)), np.zeros((3, 12, 8)), 2),  # pyright: ignore[reportCallIssue]
        lambda: weight_loader(np.zeros((2, 3)), np.zeros(3), 1),  # pyright: ignore[reportCallIssue]
        lambda: weight_loader(np.zeros((3, 2, 3)), np.zeros(3), 1, 0),  # pyright: ignore[reportCallIssue]
    ],
)
def test_ids_by_position_are_a_type_error(call: Callable[[], object]) -> None:
    with pytest.raises(TypeError):
        call()


@pytest.mark.parametrize(
    "ids", [{"expert_id": 3}, {"expert_id": -1}, {"shard_id": 3}, {"expert_id": 0, "shard_id": -1}]
)
def test_an_id_without_a_place_is_refused(ids: dict[str, int]) -> None:
    param = np.zeros((3, 2, 4))
    with pytest.raises(ValueError, match="has no place in a parameter of shape"):
        weight_loader(param, np.ones(param.shape[len(ids) :]), **ids)
    assert not param.any()


def test_a_rank_takes_its_own_experts_and_says_so() -> None:
    """Expert parallel: the parameter holds experts 2 and 3 of 5."""
    whole, held = numbered(5, 2, M, D), range(2, 4)
    param = np.zeros((2, 2, M, D), whole.dtype)
    filled = [
        [
            weight_loader(
                param, whole[expert, shard], shard_id=shard, expert_id=expert, experts=held, return_success=True
            )
            for shard in range(2)
        ]
        for expert in range(5)
    ]
    assert filled == [[False, False], [False, False], [True, True], [True, True], [False, False]]
    np.testing.assert_array_equal(param, whole[2:4])
    with pytest.raises(ValueError, match="expert 4 is not among experts 2 to 3"):
        weight_loader(param, whole[4, 0], shard_id=0, expert_id=4, experts=held)


@pytest.mark.parametrize("return_success", [False, True])
@pytest.mark.parametrize("expert", [-1, 5, 1 << 40])
def test_an_expert_that_no_rank_has_is_refused_and_not_skipped(expert: int, return_success: bool) -> None:
    param = np.zeros((2, 2, M, D))
    options = {"experts": range(2, 4), "num_experts": 5, "return_success": return_success}
    with pytest.raises(ValueError, match=f"expert {expert} is no rank's, expected an id from 0 to 4"):
        weight_loader(param, np.ones((M, D)), shard_id=0, expert_id=expert, **options)
    with pytest.raises(ValueError, match="expert -1 is no rank's"):
        weight_loader(param, np.ones((M, D)), shard_id=0, expert_id=-1, experts=range(2, 4), return_success=True)
    assert not param.any()


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_rank_takes_its_own_experts_of_a_fused_tensor(is_transposed: bool) -> None:
    whole = numbered(5, 2 * M, D)
    given = whole.swapaxes(1, 2) if is_transposed else whole
    for held in (range(2), range(2, 4), range(4, 5)):
        param = np.zeros((len(held), 2, M, D), whole.dtype)
        assert load_fused_expert_weights(param, given, num_shards=2, experts=held, return_success=True) is True
        np.testing.assert_array_equal(param.reshape(-1, 2 * M, D), whole[held.start : held.stop])
    none = np.zeros((0, 2, M, D), whole.dtype)
    assert load_fused_expert_weights(none, given, num_shards=2, experts=range(5, 5), return_success=True) is False


@pytest.mark.parametrize("held", [range(3, 6), range(0, 4, 2), range(-1, 1), range(2)])
def test_experts_that_a_rank_cannot_hold_are_refused(held: range) -> None:
    param = np.zeros((3, 2, M, D)) if held == range(3, 6) else np.zeros((len(held) + (held == range(2)), 2, M, D))
    with pytest.raises(ValueError, match="expected"):
        load_fused_expert_weights(param, np.zeros((5, 2 * M, D)), num_shards=2, experts=held)
