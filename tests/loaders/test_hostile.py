"""The 55 hostile files of facts/loaders.md, section 4, by the front door: opened and streamed, one outcome each.

Refused is one exception type with a sentence for each problem, whatever parser would have failed in whatever way.
What is odd and lawful is read to the bytes that are there. Nothing hangs, nothing dies, nothing is read twice over.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import CONFIG, entry, framed, indexed, safetensors, write

from loaders import CheckpointError, open_checkpoint
from loaders.reading.plan import plan_load
from loaders.stage import Stage
from parity.zoo import make_checkpoint

REFUSED, READ = "refused", "read"
FOUR, F32 = b"\1\2\3\4", entry("F32", [1], 0, 4)
ONE = safetensors({"a": F32}, FOUR)
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

Make = Callable[[Path], Any]


def raw(content: bytes) -> Make:
    return lambda directory: write(directory, {"model.safetensors": content})


def of(entries: Any, data: bytes = b"") -> Make:
    return raw(safetensors(entries, data))


def twice(first: Any, second: Any, data: bytes) -> Make:
    return of(f'{{"a": {json.dumps(first)}, "a": {json.dumps(second)}}}', data)


def padded(num_bytes: int) -> Make:
    def make(directory: Path) -> None:
        write(directory, {"model.safetensors": num_bytes.to_bytes(8, "little") + b"{}"})
        os.truncate(directory / "model.safetensors", 8 + num_bytes)

    return make


def split(files: dict[str, bytes], weight_map: dict[str, str]) -> Make:
    return lambda directory: write(directory, indexed(files, weight_map))


def fifo(directory: Path) -> None:
    write(directory, {})
    os.mkfifo(directory / "model.safetensors")


def linked_out(directory: Path) -> None:
    write(directory, {})
    (directory.parent / "secret.safetensors").write_bytes(ONE)
    (directory / "model.safetensors").symlink_to("../secret.safetensors")


def name(text: str) -> Make:
    return of({text: F32}, FOUR)


TWO = {A: ONE, B: safetensors({"b": F32}, FOUR)}
# case -> outcome, how it is made; where it is read: dtype and bytes of each tensor
CASES: dict[str, tuple[str, Make] | tuple[str, Make, dict[str, bytes]]] = {
    "empty": (REFUSED, raw(b"")),
    "less than 8 bytes": (REFUSED, raw(b"\0" * 7)),
    "header of length 0": (REFUSED, raw(framed(b""))),
    "header longer than the file": (REFUSED, raw((1 << 20).to_bytes(8, "little") + b"{}")),
    "header of 2^63": (REFUSED, raw((1 << 63).to_bytes(8, "little") + b"{}")),
    "header of 101 MB": (REFUSED, padded(101_000_000)),
    "header of 90 MB, padded": (REFUSED, padded(90_000_000)),
    "not JSON": (REFUSED, raw(framed(b"{]"))),
    "JSON list": (REFUSED, raw(framed(b"[]"))),
    "byte order mark": (REFUSED, raw(framed(b"\xef\xbb\xbf{}"))),
    "UTF-16": (REFUSED, raw(framed("{}".encode("utf-16")))),
    "invalid UTF-8": (REFUSED, raw(framed(b'{"\xff": 1}'))),
    "field missing": (REFUSED, of({"a": {"dtype": "F32", "shape": [1]}}, FOUR)),
    "lone surrogate": (REFUSED, of('{"a\\ud800": ' + json.dumps(F32) + "}", FOUR)),
    "name with NUL": (REFUSED, name("a\0b")),
    "name with newline": (REFUSED, name("a\nb")),
    "name empty": (REFUSED, name("")),
    "name like a path": (READ, name("../../x"), {"../../x": FOUR}),  # it is never used as one
    "key twice, same range": (REFUSED, twice(F32, F32, FOUR)),
    "key twice, disjoint": (REFUSED, twice(F32, entry("F32", [1], 4, 8), FOUR * 2)),
    "__metadata__ twice": (REFUSED, of('{"__metadata__": {}, "__metadata__": {}}')),
    "__metadata__ of numbers": (REFUSED, of({"__metadata__": {"k": 1}})),
    "overlap, whole": (REFUSED, of({"a": F32, "b": F32}, FOUR)),
    "overlap, partial": (REFUSED, of({"a": F32, "b": entry("F32", [1], 2, 6)}, b"123456")),
    "hole at the start": (REFUSED, of({"a": entry("F32", [1], 4, 8)}, FOUR * 2)),
    "hole in the middle": (REFUSED, of({"a": F32, "b": entry("F32", [1], 8, 12)}, FOUR * 3)),
    "offsets reversed": (REFUSED, of({"a": entry("F32", [1], 4, 0)}, FOUR)),
    "offsets negative": (REFUSED, of({"a": entry("F32", [1], -4, 0)}, FOUR)),
    "trailing bytes": (REFUSED, raw(ONE + b"\0")),
    "truncated": (REFUSED, raw(ONE[:-1])),
    "offset past the end": (REFUSED, of({"a": entry("F32", [2], 0, 8)}, FOUR)),
    "shape product wraps": (REFUSED, of({"a": entry("F32", [1 << 32, 1 << 32], 0, 0)})),
    "shape of another size": (REFUSED, of({"a": entry("F32", [2], 0, 4)}, FOUR)),
    "dimension negative": (REFUSED, of({"a": entry("F32", [-1], 0, 4)}, FOUR)),
    "dimension a float": (REFUSED, of({"a": entry("F32", [1.0], 0, 4)}, FOUR)),
    "[0, 2^60]": (REFUSED, of({"a": entry("F32", [0, 1 << 60], 0, 0)})),
    "10 000 dimensions": (REFUSED, of({"a": entry("F32", [1] * 10_000, 0, 4)}, FOUR)),
    "dtype unknown": (REFUSED, of({"a": entry("F31", [1], 0, 4)}, FOUR)),
    "dtype in lower case": (REFUSED, of({"a": entry("f32", [1], 0, 4)}, FOUR)),
    "dtype F6": (REFUSED, of({"a": entry("F6", [4], 0, 3)}, FOUR[:3])),
    "dtype F6_E2M3": (REFUSED, of({"a": entry("F6_E2M3", [4], 0, 3)}, FOUR[:3])),
    "dtype F6_E3M2": (REFUSED, of({"a": entry("F6_E3M2", [4], 0, 3)}, FOUR[:3])),
    "F4, packed": (READ, of({"a": entry("F4", [2, 4], 0, 4)}, FOUR), {"a": FOUR}),
    "F8_E4M3": (READ, of({"a": entry("F8_E4M3", [4], 0, 4)}, FOUR), {"a": FOUR}),
    "F8_E5M2": (READ, of({"a": entry("F8_E5M2", [4], 0, 4)}, FOUR), {"a": FOUR}),
    "F8_E8M0": (READ, of({"a": entry("F8_E8M0", [4], 0, 4)}, FOUR), {"a": FOUR}),
    "BOOL of other bytes": (READ, of({"a": entry("BOOL", [4], 0, 4)}, bytes([0, 1, 2, 255])), {"a": b"\0\1\1\1"}),
    "NaN and infinity": (
        READ,
        of({"a": entry("F32", [2], 0, 8)}, b"\1\0\xc0\x7f\0\0\x80\xff"),
        {"a": b"\1\0\xc0\x7f\0\0\x80\xff"},
    ),
    "misaligned": (
        READ,
        of({"a": entry("U8", [1], 0, 1), "b": entry("F32", [1], 1, 5)}, b"12345"),
        {"a": b"1", "b": b"2345"},
    ),
    "a FIFO": (REFUSED, fifo),
    "nested 100 000 deep": (REFUSED, of('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")),
    "index to the parent": (REFUSED, split({A: ONE}, {"a": A, "b": "../secret.safetensors"})),
    "index to an absolute path": (REFUSED, split({A: ONE}, {"a": A, "b": "/etc/passwd"})),
    "a link out of the directory": (REFUSED, linked_out),
    "file of the index missing": (REFUSED, split({A: ONE}, {"a": A, "b": B})),
    "tensor of the index absent": (REFUSED, split(TWO, {"a": A, "b": B, "c": A})),
    "tensor not in the index": (REFUSED, split(TWO, {"a": A, "x": B})),
    "tensor in two files": (REFUSED, split({A: ONE, B: ONE}, {"a": A})),
}


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"it hung for {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_file_has_the_outcome_it_should(tmp_path: Path, case: str) -> None:
    outcome, make, *expected = CASES[case]
    make(tmp_path / "checkpoint")
    with deadline(20):
        tracemalloc.start()
        try:
            found = {name: array.tobytes() for name, array in open_checkpoint(tmp_path / "checkpoint").stream()}
        except CheckpointError as error:
            found = error
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 << 20  # nothing of the size that a file claims was allocated
    if outcome == READ:
        assert found == expected[0]
        return
    assert isinstance(found, CheckpointError)
    assert all("\n" not in problem and problem.isprintable() for problem in found.problems)
    assert len(str(found)) < 2000


def test_they_are_all_there() -> None:
    assert len(CASES) >= 55


def test_the_same_bytes_of_another_dtype_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    """I32 where floats belong; only who knows the model can tell."""
    path = make_checkpoint("qwen3", tmp_path / "c", num_hidden_layers=1, dtype="F32")
    file = path / "model.safetensors"
    changed = file.read_bytes().replace(b'"F32"', b'"I32"', 1)
    file.write_bytes(changed)
    with pytest.raises(CheckpointError, match="is I32, expected one of F32, BF16, F16"):
        plan_load(open_checkpoint(path), Stage())


# Files that change in the middle of a tensor, while several threads read it


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def rewritten(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(1 << 20))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def set_back(path: Path) -> None:
    before = path.stat()
    time.sleep(0.02)  # the clock of a file system may tick every few ms only
    rewritten(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


def removed(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("change", [cut, rewritten, set_back, replaced, removed])
def test_a_file_that_changes_in_the_middle_of_a_tensor_is_an_error_and_none_is_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    content = np.random.default_rng(0).integers(0, 255, 6 << 20, np.uint8).tobytes()
    files = {
        file: safetensors({one: entry("U8", [6 << 20], 0, 6 << 20)}, content) for one, file in (("a", A), ("b", B))
    }
    directory = write(tmp_path / "c", {**indexed(files, {"a": A, "b": B}), "config.json": CONFIG})
    monkeypatch.setattr("loaders.reading.memory.STAGING_BYTES", 1 << 16)  # so are stretches of a quarter MiB
    monkeypatch.setattr("loaders.stream.WINDOW_BYTES", 1 << 20)
    checkpoint = open_checkpoint(directory)
    real, done = os.preadv, []

    def changing(descriptor: int, buffers: Any, position: int) -> int:
        done.append(position)
        if len(done) == 6:  # a quarter of the first tensor is there
            change(directory / A)
        return real(descriptor, buffers, position)

    monkeypatch.setattr(os, "preadv", changing)
    found: dict[str, bytes] = {}
    error = None
    try:
        found.update((name, array.tobytes()) for name, array in checkpoint.stream())
    except CheckpointError as raised:
        error = raised
    assert all(array == content for array in found.values())
    assert isinstance(error, CheckpointError)
    assert found == {}
