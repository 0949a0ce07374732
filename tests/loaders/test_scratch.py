"""Memory that parameters are read into which nobody keeps: the same bytes, in memory that is made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from loaders import CheckpointError, open_checkpoint
from loaders.checkpoint import Checkpoint
from loaders.quantization.quantize import open_to_load
from loaders.reading import scratch
from loaders.reading.filling import Filling
from loaders.reading.lots import lots_of_plan
from loaders.reading.memory import aligned_empty
from loaders.reading.plan import LoadPlan, plan_load
from loaders.reading.regions import Box
from loaders.reading.scratch import Scratch, Staging
from loaders.reading.shards import read_shards
from loaders.reading.whole import read_whole
from loaders.spec import ParamSpec
from loaders.stage import Stage
from parity.zoo import ZooQuantization, block_sizes, make_checkpoint

KINDS = ("qwen3-moe", "qwen3-tied", "nvfp4", "quantize")


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadPlan]:
    root = tmp_path_factory.mktemp("scratch")
    sizes = block_sizes("qwen3-moe", aligned=True)
    plain = make_checkpoint("qwen3-moe", root / "plain", dtype="BF16", **sizes)
    found: dict[str, Checkpoint] = {
        "qwen3-moe": open_checkpoint(plain),
        "qwen3-tied": open_checkpoint(make_checkpoint("qwen3-tied", root / "tied", ship_tied_head=True)),
        "nvfp4": open_checkpoint(make_checkpoint("qwen3-moe", root / "nvfp4", quantization=ZooQuantization(), **sizes)),
        "quantize": open_to_load(plain, "nvfp4"),
    }
    return {kind: plan_load(found[kind], Stage()).within(None, staged=True) for kind in KINDS}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all memory that was read into."""
    sizes: list[int] = []

    def noted(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        array = aligned_empty(shape, dtype)
        sizes.append(array.nbytes)
        return array

    monkeypatch.setattr(scratch, "aligned_empty", noted)
    return sizes


def halves(spec: ParamSpec) -> list[Box]:
    """Two parts of a parameter, cut along its last axis; of what has one number or none, all of it."""
    box = tuple((0, size) for size in spec.shape)
    if not box or box[-1][1] < 2:
        return [box]
    middle = box[-1][1] // 2
    return [(*box[:-1], (0, middle)), (*box[:-1], (middle, box[-1][1]))]


def whole(filling: Filling, **options: Staging) -> Iterator[tuple[str, list[np.ndarray]]]:
    return ((spec.name, [param]) for spec, param in read_whole(filling, **options))


def in_shards(filling: Filling, **options: Staging) -> Iterator[tuple[str, list[np.ndarray]]]:
    filling.plan = filling.plan.within(None, staged=True, boxes_of=halves)
    return ((spec.name, list(parts.values())) for spec, parts in read_shards(filling, **options))


WAYS = (whole, in_shards)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", WAYS)
def test_the_same_parameters_are_read_into_memory_made_once(
    read: Callable[..., Any], kind: str, plans: dict[str, LoadPlan], made: list[int]
) -> None:
    plan = plans[kind]
    filling, again = Filling(plan), Filling(plan)
    kept = dict(read(filling))
    made.clear()
    found = {}
    for name, parts in read(again, staging=Staging()):
        assert all(part.flags.aligned for part in parts)
        found[name] = [part.copy() for part in parts]
    assert again.finish() == filling.finish()
    assert found.keys() == kept.keys() == {spec.name for spec in plan.specs}
    for name, parts in kept.items():
        assert [part.tobytes() for part in found[name]] == [part.tobytes() for part in parts], name
        assert [part.shape for part in found[name]] == [part.shape for part in parts]
    lots = [{plan.targets[name][0].name for name in lot if name in plan.targets} for lot in lots_of_plan(plan)]
    assert len(lots) > 2, "memory is used again"
    shipped = {name for lot in lots_of_plan(plan) for name in lot if name in plan.verified}
    assert shipped == (
        {"lm_head.weight"} if kind == "qwen3-tied" else set()
    )  # a lot of its own, no larger than another
    rooms = {name: sum(-(-part.nbytes // 8) * 8 for part in parts) for name, parts in kept.items()}
    assert made == [max(sum(rooms[name] for name in lot) for lot in lots)]


@pytest.mark.parametrize("read", WAYS)
def test_what_is_waited_for_keeps_its_memory(
    read: Callable[..., Any], plans: dict[str, LoadPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tensor never comes: what is read after it is right all the same, and at the end it is said."""
    plan = plans["qwen3-moe"]
    kept = dict(read(Filling(plan)))
    lost = next(name for name, (_, source) in plan.targets.items() if source.index)
    owner = plan.targets[lost][0].name
    for way in ("stream", "stream_regions"):
        original = getattr(Checkpoint, way)

        def without(*args: Any, original: Any = original, **options: Any) -> Iterator[tuple[str, Any]]:
            return (one for one in original(*args, **options) if one[0] != lost)

        monkeypatch.setattr(Checkpoint, way, without)
    filling = Filling(plan)
    found = {name: [part.copy() for part in parts] for name, parts in read(filling, staging=Staging())}
    assert found.keys() == kept.keys() - {owner}
    for name, parts in found.items():
        assert [part.tobytes() for part in parts] == [part.tobytes() for part in kept[name]], name
    with pytest.raises(CheckpointError, match=f"'{lost}' was never delivered"):
        filling.finish()


class LateStaging(Staging):
    """As a device is: what it was given it reads when somebody waits for it."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, list[np.ndarray]]] = []
        self.found: dict[str, list[bytes]] = {}

    def settle(self) -> None:
        self.found |= {name: [part.tobytes() for part in parts] for name, parts in self.waiting}
        self.waiting.clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", WAYS)
def test_memory_is_not_written_again_before_it_was_read(
    read: Callable[..., Any], kind: str, plans: dict[str, LoadPlan]
) -> None:
    plan, late = plans[kind], LateStaging()
    kept = {name: [part.tobytes() for part in parts] for name, parts in read(Filling(plan))}
    for name, parts in read(Filling(plan), staging=late):
        late.waiting.append((name, list(parts)))
    assert late.found, "memory is used again"
    late.settle()
    assert late.found == kept


def test_arrays_lie_side_by_side_until_nobody_has_them(plans: dict[str, LoadPlan], made: list[int]) -> None:
    plan = plans["qwen3-moe"]
    room = Scratch(plan, lambda spec: [spec.shape], Staging())
    assert made == []
    first, second = (room.take(name, (3, 5), np.dtype(np.uint8)) for name in "ab")
    assert len(made) == 1
    assert second.ctypes.data - first.ctypes.data == 16
    large = room.take("b", (made[0],), np.dtype(np.uint8))  # no room is left for it
    assert made[1:] == [large.nbytes]
    assert not np.shares_memory(large, first)
    room.release("a")
    assert room.take("c", (1,), np.dtype(np.float32)).ctypes.data > second.ctypes.data
    room.release("b")
    room.release("c")
    assert room.take("d", (1,), np.dtype(np.float32)).ctypes.data == first.ctypes.data


def test_what_is_only_compared_keeps_its_memory_until_the_next_tensor_is_asked_for(plans: dict[str, LoadPlan]) -> None:
    plan = plans["qwen3-tied"]
    room = Scratch(plan, lambda spec: [spec.shape], Staging())
    assert room.take_compared("model.norm.weight") is None
    head = room.take_compared("lm_head.weight")
    assert head is not None
    assert head.shape == plan.checkpoint.tensors["lm_head.weight"].shape
    stream = room.releasing(iter([("lm_head.weight", head)]))
    assert next(stream) == ("lm_head.weight", head)
    byte = np.dtype(np.uint8)
    assert not np.shares_memory(room.take("beside", (1,), byte), head)
    room.release("beside")
    assert list(stream) == []
    assert np.shares_memory(room.take("after", (1,), byte), head)


def test_parameters_that_stay_have_no_scratch(plans: dict[str, LoadPlan]) -> None:
    with pytest.raises(AssertionError, match="stay"):
        Scratch(plans["qwen3-tied"].within(None, staged=False), lambda spec: [spec.shape], Staging())
