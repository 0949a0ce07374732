"""Streaming: order, memory, destinations, files that change underneath, and iterators that are abandoned."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import CONFIG, entry, open_files, safetensors, write
from streamed import KIB, SIZES, content, reader_threads, seven_tensors, truncate

import loaders.checkpoint
from loaders import Checkpoint, CheckpointError, open_checkpoint
from loaders.reading.memory import thread_count
from loaders.reading.slices import Slice
from loaders.sources import LocalDirectory, positioned
from loaders.writing.writer import TensorType, write_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return seven_tensors(tmp_path / "checkpoint")


FILE_ORDER = ["a", "c", "g", "d", "f", "e", "b"]  # file by file, float32 before bfloat16


@pytest.mark.parametrize("budget", [None, 64 * KIB, 100 * KIB, 1 << 30])
def test_tensors_come_in_file_order_with_their_bytes(checkpoint: Checkpoint, budget: int | None) -> None:
    found = list(checkpoint.stream(budget))
    assert [name for name, _ in found] == FILE_ORDER
    places = [(checkpoint.tensors[name].file, checkpoint.tensors[name].offsets) for name, _ in found]
    assert places == sorted(places)
    for name, array in found:
        assert array.dtype == content(name).dtype
        assert array.tobytes() == content(name).tobytes()


def test_arrays_are_aligned_memory_of_their_own_and_never_reused(checkpoint: Checkpoint) -> None:
    kept = dict(checkpoint.stream(64 * KIB))
    again = dict(checkpoint.stream(64 * KIB))
    arrays = [*kept.values(), *again.values()]
    assert all(array.ctypes.data % 64 == 0 for array in arrays)
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])
    for name, array in kept.items():
        array.view(np.uint8)[:] = 0
        assert again[name].tobytes() == content(name).tobytes()


@pytest.mark.parametrize("budget", [64 * KIB, 72 * KIB, 130 * KIB])
def test_held_bytes_stay_within_the_budget(checkpoint: Checkpoint, budget: int) -> None:
    list(checkpoint.stream(budget))  # so that what is allocated once for good is not counted

    def peak() -> int:
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        stream = checkpoint.stream(budget)
        for _ in SIZES:
            name, array = next(stream)
            assert array.nbytes == SIZES[name] * KIB
            del array
        assert next(stream, None) is None
        found = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        return found

    least = min(peak() for _ in range(3))  # threads of other tests are counted too, when they happen to run
    assert budget // 2 < least < budget + 40 * KIB  # the machinery: executor, threads, futures


def test_the_objects_of_tiny_tensors_are_within_the_budget_too(tmp_path: Path) -> None:
    tensors = {f"t{i:05}": entry("U8", [16], 16 * i, 16 * i + 16) for i in range(10000)}
    checkpoint = open_checkpoint(write(tmp_path, {"model.safetensors": safetensors(tensors, bytes(160000))}))

    def ahead(budget: int) -> int:
        tracemalloc.start()
        stream = checkpoint.stream(budget)
        next(stream)
        found = tracemalloc.get_traced_memory()[0]
        stream.close()
        tracemalloc.stop()
        return found

    of_one = [ahead(16) for _ in range(2)][-1]  # what of each is made before any is read does not count
    assert 256 * KIB < ahead(1 << 20) - of_one < 1 << 20


class AtOnce(ThreadPoolExecutor):
    """Runs what is submitted before ``submit`` returns: the earliest that a reading thread could be."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


@pytest.mark.parametrize("budget", [64 * KIB, 72 * KIB, 130 * KIB])
def test_a_reader_that_is_always_first_stays_within_the_budget(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    real = loaders.checkpoint.aligned_empty
    alive: list[int] = []
    peak = 0

    def watched(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        nonlocal peak
        array = real(shape, dtype)
        alive.append(array.nbytes)
        weakref.finalize(array, alive.remove, array.nbytes)
        peak = max(peak, sum(alive))
        return array

    monkeypatch.setattr(loaders.checkpoint, "aligned_empty", watched)
    monkeypatch.setattr(positioned, "ThreadPoolExecutor", AtOnce)
    stream = checkpoint.stream(budget)
    while (found := next(stream, None)) is not None:
        del found
    assert alive == []
    assert budget // 2 < peak <= budget


def test_a_slow_consumer_lets_the_reader_get_ahead_by_the_budget_and_no_further(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = loaders.checkpoint.aligned_empty

    def watched(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        asked.append(int(np.prod(shape)) * dtype.itemsize // KIB)
        return real(shape, dtype)

    monkeypatch.setattr(loaders.checkpoint, "aligned_empty", watched)
    stream = checkpoint.stream(106 * KIB)  # 2 KiB of each tensor are Python's own objects
    first = next(stream)
    for thread in threading.enumerate():
        if thread.name.startswith("tandem-read"):
            thread.join(0.3)  # time to read all it may
    assert first[0] == "a"
    assert asked == [24, 56, 16, 1]  # a, c, g, d: f would make 137
    stream.close()


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, "1", float("inf"), np.float32(8)])
def test_a_budget_is_a_number_of_bytes(checkpoint: Checkpoint, budget: Any) -> None:
    out = np.empty(checkpoint.stored_shape("a"), np.float32)
    for ask in (
        lambda: checkpoint.stream(budget),
        lambda: checkpoint.stream_slices(checkpoint.slices(KIB), budget),
        lambda: checkpoint.stream_regions([["a"]], lambda _: [Slice("a").region(out.shape, out)], budget),
    ):
        with pytest.raises(ValueError, match="expected a positive number of bytes"):
            ask()
    assert next(checkpoint.stream(np.int64(1 << 30)))[0] == "a"


def test_a_tensor_larger_than_the_budget_is_refused_before_anything_is_read(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a file was opened")

    monkeypatch.setattr(LocalDirectory, "open", forbidden)
    with pytest.raises(
        ValueError, match=r"host_budget_bytes=50000 is less than 2 tensors need, the largest 65536 bytes \(e\)"
    ):
        checkpoint.stream(50_000)


def test_memory_that_is_given_does_not_count(checkpoint: Checkpoint) -> None:
    large = {name: np.empty_like(content(name)) for name in ("e", "c")}
    found = dict(checkpoint.stream(50_000, into=large.get))
    assert list(found) == FILE_ORDER
    for name, array in found.items():
        assert array.tobytes() == content(name).tobytes()
        assert (array is large.get(name)) == (name in large)


def test_destinations_are_filled_in_place_and_nothing_else_is(checkpoint: Checkpoint) -> None:
    stack = np.full((3, 6 * KIB), -1, np.float32)
    found = dict(checkpoint.stream(names=["a", "b"], into=lambda name: stack[1] if name == "a" else None))
    assert np.shares_memory(found["a"], stack)
    assert not np.shares_memory(found["b"], stack)
    assert stack[1].tobytes() == content("a").tobytes()
    assert (stack[[0, 2]] == -1).all()


@pytest.mark.parametrize(
    "wrong", [np.empty(6 * KIB, np.int32), np.empty(5, np.float32), np.broadcast_to(np.float32(1), (6 * KIB,))]
)
def test_a_destination_that_does_not_fit_is_refused_before_anything_is_read_into_it(
    checkpoint: Checkpoint, wrong: np.ndarray
) -> None:
    before = wrong.tobytes()
    with pytest.raises(ValueError, match="destination of 'a' is"):
        next(checkpoint.stream(into={"a": wrong}.get))
    assert wrong.tobytes() == before


def test_destinations_are_asked_for_when_they_are_needed_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reload makes them then, and has let go of the first ones before it comes to the last."""
    size = 4 * KIB  # four are a stretch: one has come, four are on their way, and one tensor is the next
    monkeypatch.setattr("loaders.stream.WINDOW_BYTES", 8 * size)
    monkeypatch.setattr("loaders.reading.memory.STAGING_BYTES", size)
    plan = {f"t{number:02}": TensorType("F32", (size // 4,)) for number in range(40)}
    zeros = np.zeros(size // 4, np.float32)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "c", plan, lambda name: zeros, config=CONFIG))
    made: list[weakref.ref[np.ndarray]] = []

    def destination(name: str) -> np.ndarray:
        array = np.empty(size // 4, np.float32)
        made.append(weakref.ref(array))
        return array

    for count, (name, array) in enumerate(checkpoint.stream(into=destination), 1):
        assert len(made) <= count + 20
        del array
        assert sum(ref() is not None for ref in made) <= 21, name


@pytest.mark.parametrize(("is_transposed", "expected"), [(False, 16 * KIB), (True, 4 * KIB)])
def test_more_is_read_at_once_straight_into_place_than_through_staging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_transposed: bool, expected: int
) -> None:
    monkeypatch.setattr("loaders.reading.memory.STAGING_BYTES", 4 * KIB)
    plan = {f"t{number}": TensorType("F32", (32, 32)) for number in range(8)}
    ones = np.ones((32, 32), np.float32)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "c", plan, lambda name: ones, config=CONFIG))
    real, sizes = positioned.PositionedSession.submit, []

    def submit(self: Any, file: Any, position: int, pieces: Any) -> int:
        sizes.append(sum(piece.num_bytes for piece in pieces))
        return real(self, file, position, pieces)

    monkeypatch.setattr(positioned.PositionedSession, "submit", submit)
    found = checkpoint.stream(into=lambda name: np.zeros((32, 32), np.float32, order="F" if is_transposed else "C"))
    assert all((array == ones).all() for _, array in found)
    assert max(sizes) == expected
    assert sum(sizes) == 8 * ones.nbytes


@pytest.mark.parametrize("kind", [list, set, iter, dict.fromkeys])
def test_chosen_names_come_in_file_order_however_they_are_given(
    checkpoint: Checkpoint, kind: Callable[[list[str]], Iterator[str]]
) -> None:
    assert [name for name, _ in checkpoint.stream(names=kind(["b", "g", "a", "b"]))] == ["a", "g", "b"]
    assert list(checkpoint.stream(names=kind([]))) == []


def test_an_unknown_name_is_a_key_error_before_anything_is_read(checkpoint: Checkpoint) -> None:
    with pytest.raises(KeyError, match="'x'"):
        checkpoint.stream(names=["a", "x"])


def test_one_name_where_several_are_expected_is_not_taken_for_its_letters(checkpoint: Checkpoint) -> None:
    for attempt in (lambda: checkpoint.stream(names="ab"), lambda: list(checkpoint.slices(1 << 20, "ab"))):
        with pytest.raises(ValueError, match=r"names='ab' is one name, expected several: \['ab'\]"):
            attempt()


# Abandoned iterators


def test_an_iterator_abandoned_half_way_leaves_no_thread_and_no_open_file(checkpoint: Checkpoint) -> None:
    before = open_files()
    for budget in (64 * KIB, 1 << 30):
        stream = checkpoint.stream(budget)
        next(stream)
        next(stream)
        assert 1 <= len(reader_threads()) <= thread_count()
        del stream
        gc.collect()
        assert reader_threads() == []
        assert open_files() == before


def test_a_finished_a_failed_and_an_unstarted_iterator_leave_nothing_behind(checkpoint: Checkpoint) -> None:
    before = open_files()
    list(checkpoint.stream())
    checkpoint.stream()
    truncate(Path(str(checkpoint.source)) / checkpoint.tensors["e"].file)
    with pytest.raises(CheckpointError):
        list(checkpoint.stream())
    gc.collect()
    assert (reader_threads(), open_files()) == ([], before)


def test_an_exception_of_the_consumer_stops_the_reader(checkpoint: Checkpoint) -> None:
    def consume() -> None:
        for name, _ in checkpoint.stream():
            if name == "g":
                raise RuntimeError("the consumer failed")

    before = open_files()
    with pytest.raises(RuntimeError, match="the consumer failed"):
        consume()
    gc.collect()
    assert (reader_threads(), open_files()) == ([], before)


def test_one_tensor_is_read_by_whoever_asks_and_several_by_threads(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, readers = os.preadv, []

    def watched(*arguments: Any) -> int:
        readers.append(threading.current_thread() is threading.main_thread())
        return real(*arguments)

    monkeypatch.setattr(os, "preadv", watched)
    for name in SIZES:
        assert checkpoint.read(name).tobytes() == content(name).tobytes()
    assert len(readers) >= len(SIZES)
    assert all(readers)
    readers.clear()
    monkeypatch.setattr("loaders.reading.memory.STAGING_BYTES", 64 * KIB)
    assert [name for name, _ in checkpoint.stream()] == FILE_ORDER
    assert readers
    assert not any(readers)  # nor the first, which waited for the second


def test_a_tensor_that_cannot_be_read_is_named_and_its_file_closed(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> int:
        raise OSError(5, "Input/output error")

    before = open_files()
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match=r"tensor 'e' of model-00002\S+ cannot be read: Input/output error"):
        checkpoint.read("e")
    assert open_files() == before


def test_two_streams_of_one_checkpoint_do_not_disturb_each_other(checkpoint: Checkpoint) -> None:
    pairs = list(zip(checkpoint.stream(64 * KIB), checkpoint.stream(1 << 20), strict=True))
    assert [one[0] for one, _ in pairs] == FILE_ORDER
    assert all(one[1].tobytes() == other[1].tobytes() == content(one[0]).tobytes() for one, other in pairs)


def test_closing_waits_for_the_pieces_that_are_being_read_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = np.zeros(64 * KIB, np.uint8)
    plan = {f"t{number:02}": TensorType("U8", (64 * KIB,)) for number in range(64)}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "c", plan, lambda name: zeros, config=CONFIG))
    monkeypatch.setattr("loaders.reading.memory.STAGING_BYTES", 64 * KIB)
    real, started = os.preadv, []

    def slow(*arguments: Any) -> int:
        started.append(arguments[-1])
        time.sleep(0.1)
        return real(*arguments)

    stream = checkpoint.stream()
    monkeypatch.setattr(os, "preadv", slow)
    next(stream)
    before, begun = time.monotonic(), len(started)
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert time.monotonic() - before < 1
    assert len(started) <= begun + thread_count()
    assert reader_threads() == []


CONTINUES = """
import os, signal, sys, warnings
from loaders import CheckpointError, open_checkpoint

warnings.simplefilter("ignore")  # Python's own, of threads and forks
stream = open_checkpoint(sys.argv[1]).stream(64 << 10)
next(stream)
if not (child := os.fork()):
    signal.alarm(20)
    try:
        list(stream)
    except CheckpointError as error:
        print(error, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "it waited for ever"
assert len(list(stream)) == 6
"""


@pytest.mark.parametrize("scheme", ["", "direct://"])
def test_a_stream_that_a_forked_child_goes_on_with_is_an_error_there_and_goes_on_here(
    scheme: str, checkpoint: Checkpoint
) -> None:
    command = [sys.executable, "-c", CONTINUES, f"{scheme}{checkpoint.source}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "begun in the process that forked this one" in done.stdout
