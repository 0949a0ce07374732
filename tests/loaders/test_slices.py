"""Parts of tensors: the bytes NumPy would give, little more of the file than they are, and tensors beyond a budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import CONFIG, entry, framed, safetensors, write
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders import Checkpoint, open_checkpoint
from loaders.quantization.quantize import quantized
from loaders.reading.slices import Slice, in_parts
from loaders.sources import LocalDirectory, direct
from parity.lifecycle.lending import lent
from parity.zoo import block_sizes, make_checkpoint

SHAPES = {"a": (5, 4, 6), "b": (7,), "c": (), "d": (0, 3), "e": (40, 300), "f": (3, 1, 2, 5)}
ARRAYS = {
    name: np.random.default_rng(ord(name)).integers(0, 1 << 16, shape, np.uint16) for name, shape in SHAPES.items()
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    entries, data = {}, b""
    for name, array in ARRAYS.items():
        entries[name] = entry("U16", list(array.shape), len(data), len(data) + array.nbytes)
        data += array.tobytes()
    return open_checkpoint(write(tmp_path_factory.mktemp("c"), {"model.safetensors": safetensors(entries, data)}))


def indices(size: int) -> st.SearchStrategy[int | slice]:
    bound = st.one_of(st.none(), st.integers(-size - 2, size + 2))
    ranges = st.builds(slice, bound, bound)
    return st.one_of(ranges, st.integers(-size, size - 1)) if size else ranges


@st.composite
def parts(draw: st.DrawFn) -> Slice:
    name = draw(st.sampled_from(sorted(SHAPES)))
    kept = SHAPES[name][: draw(st.integers(0, len(SHAPES[name])))]
    return Slice(name, tuple(draw(indices(size)) for size in kept))


@settings(max_examples=60, deadline=None)
@given(st.lists(parts(), max_size=8), st.sampled_from([None, 0, 1]))
def test_parts_are_what_numpy_would_cut_from_the_whole(wanted: list[Slice], seed: int | None) -> None:
    checkpoint = HELD["checkpoint"]
    with nullcontext() if seed is None else lent(seed):
        found = list(checkpoint.stream_slices(wanted))
    assert sorted(map(repr, wanted)) == sorted(repr(part) for part, _ in found)
    for part, array in found:
        np.testing.assert_array_equal(array, ARRAYS[part.name][part.index])
        assert array.shape == ARRAYS[part.name][part.index].shape
        assert array.flags.c_contiguous


HELD: dict[str, Checkpoint] = {}


@pytest.fixture(autouse=True)
def held(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """For hypothesis, which makes no fixtures; and pieces so small that runs are cut."""
    HELD["checkpoint"] = checkpoint
    monkeypatch.setattr("loaders.reading.memory.STAGING_BYTES", 101)


def test_parts_come_in_file_order_and_go_where_they_should(checkpoint: Checkpoint) -> None:
    wanted = [Slice("e", (slice(30, 40),)), Slice("a", (4,)), Slice("a", (slice(0, 2), 1)), Slice("b")]
    places = {part: np.zeros(part.shape(SHAPES[part.name]), np.uint16) for part in wanted[:2]}
    found = list(checkpoint.stream_slices(wanted, into=lambda part: places.get(part)))
    assert [part for part, _ in found] == [wanted[2], wanted[1], wanted[3], wanted[0]]
    for part, array in found:
        assert (array is places.get(part)) == (part in places)
        np.testing.assert_array_equal(array, ARRAYS[part.name][part.index])


def test_read_slice_reads_one(checkpoint: Checkpoint) -> None:
    out = np.zeros((4, 7), np.uint16)
    assert checkpoint.read_slice("e", (slice(3, 7), slice(5, 12)), out) is out
    np.testing.assert_array_equal(out, ARRAYS["e"][3:7, 5:12])
    np.testing.assert_array_equal(checkpoint.read_slice("a", (-1, slice(None), 2)), ARRAYS["a"][-1, :, 2])


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ((0, 0, 0, 0), r"'a' has shape \(5, 4, 6\), which 4 indices are too many for"),
        ((5,), r"no index 5 on an axis of 5"),
        ((0, -5), r"no index -5 on an axis of 4"),
        ((slice(0, 4, 2),), r"'a' is asked for in steps of 2, expected 1"),
        ((slice(None, None, -1),), r"in steps of -1, expected 1"),
    ],
)
def test_a_part_that_is_none_is_an_index_error_before_anything_is_read(
    checkpoint: Checkpoint, index: tuple[int | slice, ...], problem: str
) -> None:
    for attempt in (lambda: checkpoint.read_slice("a", index), lambda: checkpoint.stream_slices([Slice("a", index)])):
        with pytest.raises(IndexError, match=problem):
            attempt()
    with pytest.raises(KeyError):
        checkpoint.stream_slices([Slice("x")])


@pytest.mark.parametrize(
    "index",
    [(True,), (0, np.False_), (...,), (None,), (0.0,), ([0, 1],), (slice(0.0, 2.0),), (slice(True),), ..., 0, "a", [0]],
)
def test_an_index_of_another_kind_is_a_value_error_that_says_what_is_accepted(
    checkpoint: Checkpoint, index: Any
) -> None:
    with pytest.raises(ValueError, match="'a' is asked for by the index .*, expected a tuple of integers and slices"):
        checkpoint.read_slice("a", index)


def test_integers_of_numpy_are_integers(checkpoint: Checkpoint) -> None:
    index = (np.int64(-1), slice(np.uint8(1), np.int32(3)))
    np.testing.assert_array_equal(checkpoint.read_slice("a", index), ARRAYS["a"][index])


def test_a_destination_of_a_part_may_be_strided_but_not_read_only(checkpoint: Checkpoint) -> None:
    memory = np.zeros((5, 3, 4), np.uint16)
    checkpoint.read_slice("e", (slice(1, 5), slice(2, 5)), memory[2].T)
    np.testing.assert_array_equal(memory[2], ARRAYS["e"][1:5, 2:5].T)
    assert not memory[[0, 1, 3, 4]].any()
    memory.flags.writeable = False
    with pytest.raises(ValueError, match=r"destination of 'e' is uint16 \(3, 4\) \(read-only\), expected writeable"):
        checkpoint.read_slice("e", (slice(0, 3), slice(0, 4)), memory[0])


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(position, bytes) of every read."""
    found: list[tuple[int, int]] = []
    real = os.preadv

    def watched(descriptor: int, buffers: Any, position: int) -> int:
        found.append((position, sum(len(one) for one in buffers)))
        return real(descriptor, buffers, position)

    monkeypatch.setattr(os, "preadv", watched)
    monkeypatch.setattr("loaders.reading.memory.STAGING_BYTES", 8 << 20)
    return found


def test_rows_are_one_read_of_their_bytes_alone(checkpoint: Checkpoint, reads: list[tuple[int, int]]) -> None:
    checkpoint.read_slice("e", (slice(10, 20),))
    start = checkpoint.tensors["e"].offsets[0]
    assert reads == [(start + 10 * 600, 10 * 600)]


def test_columns_are_read_across_small_gaps_and_around_large_ones(tmp_path: Path, reads: list[tuple[int, int]]) -> None:
    for width, expected in ((1000, 1), (LocalDirectory.gap_bytes + 200, 6)):
        array = np.arange(6 * width, dtype=np.uint32).astype(np.uint8).reshape(6, width)
        file = safetensors({"a": entry("U8", [6, width], 0, array.size)}, array.tobytes())
        wide = open_checkpoint(write(tmp_path / str(width), {"model.safetensors": file}))
        reads.clear()
        np.testing.assert_array_equal(wide.read_slice("a", (slice(None), slice(100, 150))), array[:, 100:150])
        assert len(reads) == expected
        assert sum(size for _, size in reads) == (5 * width + 50 if expected == 1 else 6 * 50)


def test_tensors_that_lie_side_by_side_are_one_read(checkpoint: Checkpoint, reads: list[tuple[int, int]]) -> None:
    assert len(dict(checkpoint.stream())) == len(SHAPES)
    assert len(reads) == 1
    reads.clear()
    list(checkpoint.stream(names=["a", "e"]))  # over what lies between them
    assert len(reads) == 1


@pytest.mark.parametrize("most", [2, 5, 12, 13, 48, 100, 239, 240, 1 << 20])
def test_a_tensor_in_rows_is_the_tensor_and_no_part_is_larger_than_asked_for(checkpoint: Checkpoint, most: int) -> None:
    for name, array in ARRAYS.items():
        cut = list(checkpoint.slices(most, [name]))
        assert all(array[part.index].nbytes <= most for part in cut)
        assert b"".join(array[part.index].tobytes() for part in cut) == array.tobytes()
        assert len(cut) == 1 or min(array[part.index].nbytes for part in cut[:-1]) * 2 > most // 2
    with pytest.raises(ValueError, match="elements of 2 bytes, which do not fit into 1"):
        list(in_parts("a", (3,), 2, 1))


def test_parts_of_what_is_quantised_while_it_is_read_are_those_of_the_whole(tmp_path: Path) -> None:
    plain = make_checkpoint("qwen3", tmp_path / "c", dtype="BF16", **block_sizes("qwen3"))
    view = quantized(open_checkpoint(plain))
    names = [next(iter(view.matrices)) + ".weight", "model.norm.weight"]
    found = dict(view.stream_slices([Slice(name, (slice(1, 3),)) for name in names]))
    assert {part.name for part in found} == set(names)
    for part, array in found.items():
        np.testing.assert_array_equal(array.view(np.uint8), view.read(part.name)[part.index].view(np.uint8))


# Checkpoints larger than memory: files of holes, which the system reads as zeros

CHILD = """
import sys, threading
from loaders import open_checkpoint
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
path, budget, way = sys.argv[1], int(sys.argv[2]), sys.argv[3]
checkpoint = open_checkpoint(path)
before = peak = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
seen = 0
if way == "whole":
    stream = checkpoint.stream(budget)
else:
    stream = checkpoint.stream_slices(checkpoint.slices(budget // 4), budget)
for _, array in stream:
    assert not array.reshape(-1).view("u1")[:: 1 << 12].any()
    seen += array.nbytes
    del array
done.set()
watcher.join()
assert seen == checkpoint.num_bytes, (seen, checkpoint.num_bytes)
print(peak - before)
"""


def holes(directory: Path, shapes: dict[str, list[int]]) -> Path:
    entries, position = {}, 0
    for name, shape in shapes.items():
        entries[name] = entry("BF16", shape, position, position + 2 * int(np.prod(shape)))
        position = entries[name]["data_offsets"][1]
    header = framed(json.dumps(entries).encode())
    write(directory, {"model.safetensors": header, "config.json": CONFIG})
    os.truncate(directory / "model.safetensors", len(header) + position)
    return directory


def growth(path: str, budget: int, way: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, path, str(budget), way], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


BUDGETS = [24 << 20, pytest.param(512 << 20, marks=pytest.mark.slow)]


def thread_bytes(scheme: str) -> int:
    """What threads hold that read past the page cache."""
    return direct.THREADS * (8 << 20) if scheme else 0


@pytest.mark.parametrize("scheme", ["", "direct://"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_checkpoint_of_20_times_the_budget_streams_through_it(tmp_path: Path, budget: int, scheme: str) -> None:
    """Growth of anonymous memory, which is all there is of the process's own: at most the budget and 88 MiB."""
    rows = budget // 4 // 4096
    path = holes(tmp_path, {f"t{number:02}": [rows, 2048] for number in range(80)})
    grown = growth(f"{scheme}{path}", budget, "whole")
    assert budget // 4 < grown <= budget + (88 << 20 if budget > 1 << 28 else (8 << 20) + thread_bytes(scheme))


@pytest.mark.parametrize("scheme", ["", "direct://"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_one_tensor_larger_than_the_budget_streams_through_it_in_rows(tmp_path: Path, budget: int, scheme: str) -> None:
    """As a fused tensor of all experts is; beside it what is small."""
    experts = [10, 2 * budget // 20 // 8192, 4096]
    path = holes(tmp_path, {"small": [3], "experts": experts, "last": [2048, 2048]})
    assert 2 * int(np.prod(experts)) > budget * 0.9
    grown = growth(f"{scheme}{path}", budget // 4, "rows")
    assert budget // 16 < grown <= budget // 4 + (8 << 20) + thread_bytes(scheme)
