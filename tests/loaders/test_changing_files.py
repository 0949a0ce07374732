"""Files that change between opening and reading, or meanwhile: an error or the old content, never a mixture."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from streamed import KIB, SIZES, content, reader_threads, seven_tensors, truncate

from loaders import Checkpoint, CheckpointError, open_checkpoint
from loaders.sources import positioned, writers
from loaders.sources.writers import has_writer


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return seven_tensors(tmp_path / "checkpoint")


def empty(path: Path) -> None:
    os.truncate(path, 0)


def grow(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0" * 8)


def rewrite(path: Path) -> None:
    raw = path.read_bytes()
    with open(path, "r+b") as file:
        file.write(raw)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # the clock of a file system may tick every few ms only


def rewrite_and_set_the_time_back(path: Path) -> None:
    before = path.stat()
    time.sleep(0.02)  # the clock of a file system may tick every few ms only
    rewrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    copy.replace(path)


def remove(path: Path) -> None:
    path.unlink()


def turn_into_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link_outside(path: Path) -> None:
    path.rename(path.parent.parent / "moved")
    path.symlink_to(path.parent.parent / "moved")


CHANGES = [truncate, empty, grow, rewrite, rewrite_and_set_the_time_back, replace, remove, turn_into_fifo, link_outside]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_since_opening_is_an_error_and_not_other_weights(
    checkpoint: Checkpoint, change: Callable[[Path], None]
) -> None:
    file = checkpoint.tensors["a"].file
    change(Path(str(checkpoint.source)) / file)
    for attempt in (lambda: checkpoint.read("a"), lambda: list(checkpoint.stream())):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        (problem,) = caught.value.problems
        assert problem.startswith(f"{file} c")  # changed, or cannot be opened
    assert checkpoint.read("b").tobytes() == content("b").tobytes()  # the other file is as it was


@pytest.mark.parametrize("change", [truncate, empty, grow, rewrite, rewrite_and_set_the_time_back])
def test_a_file_that_changes_while_it_is_streamed_is_an_error(
    checkpoint: Checkpoint, change: Callable[[Path], None]
) -> None:
    stream = checkpoint.stream(64 * KIB)
    assert next(stream)[0] == "a"  # and of the others of its file none is read: there is no room
    change(Path(str(checkpoint.source)) / checkpoint.tensors["a"].file)
    with pytest.raises(CheckpointError):
        next(stream)
    assert reader_threads() == []


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.chmod(0o600),
        lambda path: os.link(path, path.with_suffix(".link")),
        lambda path: path.with_suffix(".other").unlink(),
        lambda path: path.unlink(),
        lambda path: path.rename(path.with_suffix(".moved")),
        replace,
    ],
    ids=["mode", "another name", "one name less", "removed", "moved", "replaced"],
)
@pytest.mark.parametrize("is_written_to", [False, True])
def test_of_a_file_whose_attributes_changed_nobody_knows_whether_it_was_written_to(
    checkpoint: Checkpoint, change: Callable[[Path], None], is_written_to: bool
) -> None:
    """As ``cp -p`` does, which sets the time back, too; to be removed or replaced afterwards hides nothing."""
    path = Path(str(checkpoint.source)) / checkpoint.tensors["a"].file
    os.link(path, path.with_suffix(".other"))
    checkpoint = open_checkpoint(path.parent)
    time.sleep(0.02)
    stream = checkpoint.stream(64 * KIB)
    next(stream)
    if is_written_to:
        rewrite_and_set_the_time_back(path)
    change(path)
    with pytest.raises(CheckpointError, match="changed since the checkpoint was opened"):
        list(stream)


def test_a_file_replaced_while_it_is_streamed_is_never_mixed_with_the_old_one(checkpoint: Checkpoint) -> None:
    path = Path(str(checkpoint.source)) / checkpoint.tensors["a"].file
    raw = path.read_bytes()
    stream = checkpoint.stream(64 * KIB, names=["a", "c", "g"])
    found = [next(stream)]
    other = path.with_suffix(".new")
    other.write_bytes(raw[: -SIZES["g"] * KIB] + b"\0" * SIZES["g"] * KIB)
    other.replace(path)
    with pytest.raises(CheckpointError, match="changed since the checkpoint was opened"):
        found += stream
    # the file that was opened is pinned
    assert [array.tobytes() for _, array in found] == [content(name).tobytes() for name in "acg"[: len(found)]]


def test_a_file_that_is_being_written_when_it_is_opened_is_refused_until_that_is_done(checkpoint: Checkpoint) -> None:
    """Its times are those of when the writing began: they say nothing of it to whoever opens it in the middle."""
    path = Path(checkpoint.source) / checkpoint.tensors["a"].file
    with open(path, "r+b", buffering=0) as writer:
        writer.write(path.read_bytes())
        with pytest.raises(CheckpointError, match=r"it changed \S+ s ago, and a program still has it open"):
            open_checkpoint(checkpoint.source)
        with pytest.raises(CheckpointError):
            list(checkpoint.stream())
    reopened = open_checkpoint(checkpoint.source)
    assert {name for name, _ in reopened.stream()} == SIZES.keys()


def test_a_file_that_nobody_has_written_to_lately_may_be_open_for_writing(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(checkpoint.source) / checkpoint.tensors["a"].file
    monkeypatch.setattr(positioned, "WRITING_S", 0.0)
    with open(path, "r+b"):
        assert len(list(open_checkpoint(checkpoint.source).stream())) == len(SIZES)


@pytest.mark.parametrize("where", [None, "nfs4"])
def test_a_file_system_that_refuses_leases_for_reasons_of_its_own_is_not_asked(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, where: str | None
) -> None:
    monkeypatch.setattr(writers, "_file_system", lambda device: where)
    with open(Path(checkpoint.source) / checkpoint.tensors["a"].file, "r+b"):
        assert len(list(open_checkpoint(checkpoint.source).stream())) == len(SIZES)


def test_opening_it_for_writing_meanwhile_kills_nobody(checkpoint: Checkpoint) -> None:
    """Who opens what is leased has the system send a signal, of which most end a process."""
    path, is_done = Path(checkpoint.source) / checkpoint.tensors["a"].file, threading.Event()

    def open_for_writing() -> None:
        while not is_done.is_set():
            os.close(os.open(path, os.O_WRONLY))

    opening = threading.Thread(target=open_for_writing)
    opening.start()
    with open(path, "rb", buffering=0) as file:
        seen = {has_writer(file.fileno()) for _ in range(3000)}
    is_done.set()
    opening.join()
    assert True in seen
    with open(path, "rb", buffering=0) as file:
        assert not has_writer(file.fileno())
