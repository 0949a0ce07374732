"""Streams of a source that reads many files at once: any order, one borrowed buffer, budgets, abandoned iterators.

The source here is the worst there could be (``parity.lifecycle.lending``); runai-model-streamer itself is in
test_runai.py.
"""

from __future__ import annotations

import gc
import os
import random
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from handmade import CONFIG, entry, open_files, safetensors, write

import loaders.checkpoint
from loaders import Checkpoint, CheckpointError, open_checkpoint
from loaders.sources import LocalDirectory
from loaders.writing.writer import TensorType, write_checkpoint
from parity.lifecycle.lending import Lending, lent

KIB = 1024
SIZES = {"f": 40, "b": 8, "e": 64, "a": 24, "d": 1, "c": 56, "g": 16, "empty": 0}  # KiB


def content(name: str) -> np.ndarray:
    rng = np.random.default_rng(len(name) + ord(name[0]))
    dtype = ml_dtypes.bfloat16 if name in "bd" else np.float32
    return rng.integers(0, 255, SIZES[name] * KIB, np.uint8).view(dtype)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    files = {name: f"model-0000{1 + (name in 'fbe')}-of-00002.safetensors" for name in SIZES}
    plan = {name: TensorType.of(content(name)) for name in SIZES}
    write_checkpoint(tmp_path / "checkpoint", plan, content, config=CONFIG, files=files)
    return open_checkpoint(tmp_path / "checkpoint")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loaders.reading.memory.STAGING_BYTES", 5 * KIB + 3)  # in the middle of an element


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [None, 64 * KIB, 100 * KIB])
def test_every_tensor_comes_once_with_its_bytes_and_may_be_kept(
    checkpoint: Checkpoint, budget: int | None, seed: int
) -> None:
    with lent(seed):
        found = list(checkpoint.stream(budget))  # all of them outlive the buffer they came in
    assert sorted(name for name, _ in found) == sorted(SIZES)
    assert all(array.tobytes() == content(name).tobytes() for name, array in found)
    assert all(array.ctypes.data % 64 == 0 for name, array in found if SIZES[name])


def test_they_come_in_another_order_than_they_lie_in(checkpoint: Checkpoint) -> None:
    orders = set()
    for seed in range(8):
        with lent(seed):
            orders.add(tuple(name for name, _ in checkpoint.stream()))
    assert len(orders) > 4
    assert tuple(checkpoint.tensors) not in orders


def test_destinations_are_filled_in_place_transposed_ones_too(tmp_path: Path) -> None:
    stored = np.arange(3 * 70 * 50, dtype=np.float32).reshape(3, 70, 50)
    file = safetensors({"a": entry("F32", [3, 70, 50], 0, stored.nbytes)}, stored.tobytes())
    checkpoint = open_checkpoint(write(tmp_path, {"model.safetensors": file}))
    for is_turned in (False, True):
        memory = np.full((3, 50, 70) if is_turned else stored.shape, -1, np.float32)
        out = memory.swapaxes(1, 2) if is_turned else memory
        with lent():
            ((name, found),) = checkpoint.stream(1, into={"a": out}.get)
        assert np.shares_memory(found, memory)
        np.testing.assert_array_equal(memory, stored.swapaxes(1, 2) if is_turned else stored)


@pytest.mark.parametrize("budget", [64 * KIB, 72 * KIB, 130 * KIB])
def test_held_bytes_stay_within_the_budget(
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
    with lent(1):
        stream = iter(checkpoint.stream(budget))
        while (found := next(stream, None)) is not None:
            del found
    assert alive == []
    assert budget // 2 < peak <= budget


def test_a_tensor_larger_than_the_budget_is_refused_before_anything_is_read(checkpoint: Checkpoint) -> None:
    with lent(), pytest.raises(ValueError, match="host_budget_bytes=50000 is less than 2 tensors need"):
        checkpoint.stream(50_000)
    with lent(), pytest.raises(ValueError, match="host_budget_bytes=50000 is less than 1 tensors need"):
        list(checkpoint.stream(50_000, into=lambda name: None))


@pytest.mark.parametrize("change", ["truncate", "rewrite"])
def test_a_file_that_changes_while_it_is_streamed_is_an_error(checkpoint: Checkpoint, change: str) -> None:
    path = Path(str(checkpoint.source)) / checkpoint.tensors["a"].file
    with lent():
        stream = iter(checkpoint.stream(64 * KIB))
        next(stream)
        if change == "truncate":
            os.truncate(path, 200)
        else:
            os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
        with pytest.raises(CheckpointError, match=r"cannot be read: it ends|changed since the checkpoint was opened"):
            list(stream)


def test_a_file_that_changed_since_opening_is_an_error_before_anything_is_yielded(checkpoint: Checkpoint) -> None:
    path = Path(str(checkpoint.source)) / checkpoint.tensors["a"].file
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with lent(), pytest.raises(CheckpointError, match="changed since the checkpoint was opened"):
        next(checkpoint.stream())


def test_an_abandoned_a_failed_and_an_unstarted_iterator_leave_nothing_open(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[list[str]] = []

    class Watched(Lending):
        def __init__(self) -> None:
            super().__init__(0)
            self.calls: list[str] = []
            sessions.append(self.calls)

        def close(self) -> None:
            self.calls.append("closed")

    monkeypatch.setattr(LocalDirectory, "session", lambda self, total_bytes: Watched())
    before = open_files()
    checkpoint.stream()
    stream = checkpoint.stream()
    next(stream)
    del stream
    list(checkpoint.stream())
    with pytest.raises(ValueError, match="destination"):
        list(checkpoint.stream(into=lambda name: np.empty(3)))
    gc.collect()
    assert sessions == [["closed"]] * 3  # one that was not started has none
    assert open_files() == before


def test_bools_are_made_such(tmp_path: Path) -> None:
    file = safetensors({"a": entry("BOOL", [4], 0, 4)}, bytes([0, 1, 2, 255]))
    with lent():
        ((_, found),) = open_checkpoint(write(tmp_path, {"model.safetensors": file})).stream()
    assert found.view(np.uint8).tolist() == [0, 1, 1, 1]


def test_sessions_of_two_streams_do_not_disturb_each_other(checkpoint: Checkpoint) -> None:
    with lent(3):
        pairs = list(zip(checkpoint.stream(64 * KIB), checkpoint.stream(1 << 20), strict=True))
    for stream in zip(*pairs, strict=True):
        assert all(array.tobytes() == content(name).tobytes() for name, array in stream)


def test_a_reader_is_only_asked_for_what_was_chosen(checkpoint: Checkpoint) -> None:
    chosen = random.Random(0).sample(list(SIZES), 3)
    with lent():
        assert {name for name, _ in checkpoint.stream(names=chosen)} == set(chosen)
