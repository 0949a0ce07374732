"""Files read past the page cache: the same bytes and the same errors, and nothing of them stays in the cache."""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import CONFIG, open_files

from loaders import CheckpointError, open_checkpoint
from loaders.reading.memory import STAGING_BYTES
from loaders.reading.regions import Piece, Region, Taker
from loaders.sources import direct
from loaders.writing.writer import TensorType, write_checkpoint
from parity.zoo import make_checkpoint

MIB = 1 << 20
SIZES = {"a": 5 * MIB + 24, "b": 8, "c": 3 * MIB, "d": 17 * MIB + 1000, "e": 2048, "f": MIB}  # bytes
SHAPES = {name: (size // 8, 4) for name, size in SIZES.items()}  # of two bytes each


def content(name: str) -> np.ndarray:
    rng = np.random.default_rng(ord(name))
    return rng.integers(0, 1 << 16, SHAPES[name], np.uint16)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    files = {name: f"model-0000{1 + (name > 'c')}-of-00002.safetensors" for name in SIZES}
    plan = {name: TensorType.of(content(name)) for name in SIZES}
    path = write_checkpoint(tmp_path / "checkpoint", plan, content, config=CONFIG, files=files)
    cool(path)
    return path


def cool(directory: Path) -> None:
    """Nothing of the files is left in the cache."""
    for file in directory.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cached_bytes(directory: Path) -> int:
    """How much of the files is in the cache, asked of the system without touching any of it (mincore)."""
    found = 0
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as opened:
            mapped = np.frombuffer(mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
        pages = (ctypes.c_ubyte * -(-mapped.size // mmap.PAGESIZE))()
        address, size = ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.size)
        assert ctypes.CDLL(None).mincore(address, size, pages) == 0
        found += mmap.PAGESIZE * sum(page & 1 for page in pages)
    return found


class Reads:
    """Bytes that were read past the cache, the most at once, and through it, but for those that ask what is there."""

    def __init__(self) -> None:
        self.past = self.most_at_once = self.through = 0


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Reads:
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"the file system of temporary files has no O_DIRECT: {error}")
    real, found = os.preadv, Reads()

    def watched(descriptor: int, buffers: Any, position: int, flags: int = 0) -> int:
        count = real(descriptor, buffers, position, flags)
        flags_of = Path(f"/proc/self/fdinfo/{descriptor}").read_text().split("flags:")[1].split()[0]
        if int(flags_of, 8) & os.O_DIRECT:
            found.past += count
            found.most_at_once = max(found.most_at_once, count)
        elif not flags:
            found.through += count
        return count

    monkeypatch.setattr(os, "preadv", watched)
    return found


def test_what_is_cold_is_read_past_the_cache_and_stays_cold(directory: Path, reads: Reads) -> None:
    before = open_files()
    checkpoint = open_checkpoint(f"direct://{directory}")
    assert str(checkpoint.source) == f"direct://{directory}"
    cool(directory)  # reading headers reads ahead
    cold, opened = cached_bytes(directory), reads.through
    found = dict(checkpoint.stream())
    assert all(found[name].tobytes() == content(name).tobytes() for name in SIZES)
    assert reads.past > sum(SIZES.values()) - 2 * direct.LEAST_BYTES
    assert reads.most_at_once <= STAGING_BYTES + 2 * direct.BLOCK_BYTES  # which a thread holds
    assert reads.through - opened < 2 * direct.LEAST_BYTES
    assert cached_bytes(directory) - cold < sum(SIZES.values()) // 8  # what was read ahead of the smaller ones
    assert open_files() == before


def test_the_tenth_load_is_as_cold_as_the_first(directory: Path, reads: Reads) -> None:
    """Asking whether a page is in the cache has the system read it."""
    for _ in range(10):
        before = reads.past
        list(open_checkpoint(f"direct://{directory}").stream())
        assert reads.past - before > sum(SIZES.values()) - 4 * direct.LEAST_BYTES


def test_what_is_in_the_cache_is_copied_from_it(directory: Path, reads: Reads) -> None:
    for file in directory.glob("*.safetensors"):
        file.read_bytes()
    found = dict(open_checkpoint(f"direct://{directory}").stream())
    assert all(found[name].tobytes() == content(name).tobytes() for name in SIZES)
    assert (reads.past, reads.through > sum(SIZES.values())) == (0, True)


def test_a_plain_path_goes_through_the_cache_unless_memory_has_no_room_for_the_files(
    directory: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(open_checkpoint(directory).stream())
    assert reads.past == 0
    cool(directory)
    monkeypatch.setattr("loaders.sources.local.physical_bytes", lambda: sum(SIZES.values()))  # headers are more
    found = dict(open_checkpoint(directory).stream(64 * MIB))
    assert reads.past > sum(SIZES.values()) - 2 * direct.LEAST_BYTES
    assert all(found[name].tobytes() == content(name).tobytes() for name in SIZES)


def test_tensors_come_in_file_order_straight_to_their_places(directory: Path, reads: Reads) -> None:
    places = {name: np.zeros(SHAPES[name], np.uint16) for name in SIZES}
    checkpoint = open_checkpoint(f"direct://{directory}")
    names = [name for name, array in checkpoint.stream(into=places.__getitem__) if array is places[name]]
    assert names == list(checkpoint.tensors)
    assert all(places[name].tobytes() == content(name).tobytes() for name in SIZES)
    assert reads.past


def test_a_file_is_closed_with_its_last_tensor(directory: Path, reads: Reads) -> None:
    seen: set[str] = set()
    for name, _ in open_checkpoint(f"direct://{directory}").stream():
        seen.add(name)
        count = [Path(path).name for path in open_files()].count("model-00001-of-00002.safetensors")
        assert count == (2 if {"a", "b", "c"} - seen else 0)  # through the cache and past it
    assert seen == SIZES.keys()


def test_regions_rows_and_columns(directory: Path, reads: Reads) -> None:
    boxes = {name: [((1, rows - 1), (0, 4)), ((0, rows), (1, 3))] for name, (rows, _) in SHAPES.items() if rows > 2}

    def wanted(name: str) -> list[Region]:
        sizes = [tuple(stop - start for start, stop in box) for box in boxes[name]]
        return [
            Region(SHAPES[name], box, np.zeros(size, np.uint16)) for box, size in zip(boxes[name], sizes, strict=True)
        ]

    for name, parts in open_checkpoint(f"direct://{directory}").stream_regions([list(boxes)], wanted):
        for part, (rows, columns) in zip(parts, boxes[name], strict=True):
            assert part.tobytes() == content(name)[slice(*rows), slice(*columns)].tobytes(), name
    assert reads.past > 8 * MIB


@pytest.mark.parametrize("fails", ["open", "preadv"])
def test_where_there_is_no_way_past_the_cache_it_is_read_through_it(
    directory: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open, real_read, refused = os.open, os.preadv, []

    def open_(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if fails == "open" and flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(22, "Invalid argument")
        return real_open(path, flags, *more, **named)

    def preadv(descriptor: int, buffers: Any, position: int, *flags: int) -> int:
        if fails == "preadv" and len(buffers) == 1 and position % direct.BLOCK_BYTES == 0 and not flags:
            refused.append(position)
            raise OSError(22, "Invalid argument")
        return real_read(descriptor, buffers, position, *flags)

    checkpoint = open_checkpoint(f"direct://{directory}")
    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    assert all(array.tobytes() == content(name).tobytes() for name, array in checkpoint.stream())
    assert refused


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 9 * MIB)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-MIB, os.SEEK_END)
        file.write(b"\0" * MIB)
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize("change", [truncate, rewrite])
def test_a_file_that_changes_while_it_is_read_is_an_error(
    directory: Path, reads: Reads, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()
    checkpoint = open_checkpoint(f"direct://{directory}")
    stream = checkpoint.stream(6 * MIB, names=["b", "c", "d"], into=lambda name: np.zeros(SHAPES[name], np.uint16))
    next(stream)
    change(directory / checkpoint.tensors["d"].file)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors (changed since|cannot be)"):
        list(stream)
    assert open_files() == before


def test_a_thread_has_one_buffer_whichever_way_it_reads(directory: Path, reads: Reads) -> None:
    """Columns go through it: of one file from the cache, of the other from the disk."""
    (directory / "model-00001-of-00002.safetensors").read_bytes()
    session = direct.DirectSession()
    checkpoint = open_checkpoint(f"direct://{directory}")
    cold = checkpoint.tensors["d"]
    with checkpoint.files.open(cold.file) as file, checkpoint.files.open(checkpoint.tensors["a"].file) as warm:
        for place in (file, warm):
            taken = np.zeros(4 * MIB, np.uint8)
            session._read(place, 4096 * 9 + 8, [Piece(0, taken.size, takers=(Taker(taken, 0, (1,)),))])  # pyright: ignore[reportArgumentType]
            assert taken.any()
    assert reads.past
    assert vars(session._local).keys() == {"blocks"}
    session.close()


def test_a_disk_that_fails_is_one_error_that_names_what_could_not_be_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(f"direct://{directory}")

    def broken(*arguments: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match=r"tensor 'd' of model-00002\S+ cannot be read: Input/output error"):
        checkpoint.read("d")


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_models_load_and_reload_so(backend: str, tmp_path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "LEAST_BYTES", 1)
    monkeypatch.setattr(
        direct, "_is_cached", lambda *stretch: False
    )  # of files so small, reading headers brings all in
    models = importlib.import_module(f"{backend}_models")
    paths = [make_checkpoint("qwen3", tmp_path / str(seed), seed=seed, num_hidden_layers=2) for seed in range(2)]
    expected = [models.load(path).digests() for path in paths]
    model = models.load(f"direct://{paths[0]}")
    assert model.digests() == expected[0]
    before = reads.past
    assert before
    assert model.update_weights_from_disk(f"direct://{paths[1]}").digests() == expected[1]
    assert reads.past > before
