"""One writer at a time, also where one was killed."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loaders.writing.directory_lock import Claim

HOLDS = """
import sys
from pathlib import Path
from loaders.writing.directory_lock import Claim
final, temporary = map(Path, sys.argv[1:])
Claim(final, temporary).take()
print("held", flush=True)
sys.stdin.read()
"""


def claim(where: Path) -> Claim:
    return Claim(where / "in" / "final", where / "in" / "final.tmp")


def test_another_process_is_told_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    mine = claim(tmp_path)
    command = [sys.executable, "-c", HOLDS, mine.final, mine.temporary]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        (mine.temporary / "of the other").touch()
        with pytest.raises(FileExistsError, match="final is being written by another at this moment"):
            mine.take()
        assert not mine.is_held
        assert (mine.temporary / "of the other").exists()
        other.send_signal(signal.SIGKILL)
    assert (mine.take(), list(mine.temporary.iterdir())) == (None, [])
    assert mine.is_held


def test_within_a_process_too_and_what_is_let_go_of_may_be_taken(tmp_path: Path) -> None:
    first, second = claim(tmp_path), claim(tmp_path)
    first.take()
    with pytest.raises(FileExistsError):
        second.take()
    first.release()
    first.release()
    second.take()
    assert (first.is_held, second.is_held) == (False, True)


def test_what_is_finished_is_left_alone(tmp_path: Path) -> None:
    one = claim(tmp_path)
    one.final.mkdir(parents=True)
    with pytest.raises(FileExistsError, match="exists now: another process wrote it"):
        one.take()
    assert not one.temporary.exists()
    assert not one.is_held


def test_where_there_are_no_locks_the_last_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refused)
    first, second = claim(tmp_path), claim(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    first.take()
    second.take()
    first.release()
    second.release()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_directory_that_goes_between_two_looks_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its writer gave up, or finished: what is locked then is nobody's."""
    first, second = claim(tmp_path), claim(tmp_path)
    first.take()
    real, gone = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not gone and how != fcntl.LOCK_UN:
            gone.append(descriptor)
            first.temporary.rmdir()
            first.release()
        real(descriptor, how)

    monkeypatch.setattr("fcntl.flock", late)
    second.take()
    assert second.is_held
    with pytest.raises(FileExistsError, match="is being written"):
        first.take()


def test_a_child_that_was_forked_meanwhile_holds_nothing_that_was_let_go_of(tmp_path: Path) -> None:
    first, second = claim(tmp_path), claim(tmp_path)
    first.take()
    with subprocess.Popen(["sleep", "20"], pass_fds=[first._held or 0]) as child:
        first.release()
        second.take()
        child.kill()


def test_below_a_file_there_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "in").touch()
    with pytest.raises(NotADirectoryError):
        claim(tmp_path).take()


def test_what_a_link_leads_to_is_not_emptied(tmp_path: Path) -> None:
    one = claim(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    one.temporary.parent.mkdir()
    one.temporary.symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match=one.temporary.name):
        one.take()
    assert (tmp_path / "mine" / "file").exists()
