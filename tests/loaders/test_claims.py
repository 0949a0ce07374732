"""One writer at a time, also where one was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loaders.claims import Claim

HOLDS = """
import sys
from pathlib import Path
from loaders.claims import Claim
final, temporary = map(Path, sys.argv[1:])
Claim(final, temporary).take(temporary.mkdir)
print("held", flush=True)
sys.stdin.read()
"""


def claim(where: Path) -> Claim:
    return Claim(where / "in" / "final", where / "in" / "final.tmp")


def taken(one: Claim) -> list[str]:
    """Take it, and what was in the way."""
    found: list[str] = []

    def make() -> None:
        if one.temporary.exists():
            found.extend(path.name for path in one.temporary.iterdir())
            for path in one.temporary.iterdir():
                path.unlink()
            one.temporary.rmdir()
        one.temporary.mkdir()

    one.take(make)
    return found


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
            taken(mine)
        assert not mine.is_ours
        assert (mine.temporary / "of the other").exists()
        other.send_signal(signal.SIGKILL)
    assert taken(mine) == ["of the other"]
    assert mine.is_ours


def test_within_a_process_too_and_what_is_let_go_of_may_be_taken(tmp_path: Path) -> None:
    first, second = claim(tmp_path), claim(tmp_path)
    assert taken(first) == []
    with pytest.raises(FileExistsError):
        taken(second)
    first.release()
    first.release()
    assert taken(second) == []
    assert second.is_ours


def test_what_is_finished_is_left_alone(tmp_path: Path) -> None:
    one = claim(tmp_path)
    one.final.mkdir(parents=True)
    with pytest.raises(FileExistsError, match="exists meanwhile"):
        taken(one)
    assert not one.temporary.exists()


def test_where_there_are_no_locks_the_last_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refused)
    first, second = claim(tmp_path), claim(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert (taken(first), taken(second)) == ([], [])
    first.release()
    second.release()
    assert len(os.listdir("/proc/self/fd")) == before
