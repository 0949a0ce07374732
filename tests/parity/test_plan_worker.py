"""The process that compiles for ``tandem plan`` ends with the one that asked it, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

import loaders
from parity.planning.chips import chip_of
from parity.planning.depths import Depths
from parity.planning.meshes import Workload
from parity.planning.plan import Request, _compiled

# what the worker imports reads a pipe, which takes as long as we like, as a compile would
ASKS = """
import sys
from parity.planning.chips import chip_of
from parity.planning.depths import Depths
from parity.planning.meshes import Workload
from parity.planning.plan import Request, _compiled

load = Workload(rows=1, context=8, prompt=8, dtype="bfloat16")
request = Request("nothing", None, None, chip_of("v5e"), load)
sys.path.insert(0, sys.argv[1])
_compiled(request, "2x2", {"tensor": 4}, Depths(1, 1, count=1, period=1, typical=range(1)))
"""
PRINTS = "import loaders; print(loaders.__file__)"
STARTS_WITHIN_S, ENDS_WITHIN_S = 120, 10


def until(is_so: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_goes_on_compiling_for_a_plan_that_was_killed(how, tmp_path):
    pipe, ends = tmp_path / "pipe", []
    os.mkfifo(pipe)
    (tmp_path / "jax.py").write_text(f"open({str(pipe)!r}).read()")
    asking = subprocess.Popen([sys.executable, "-c", ASKS, str(tmp_path)])

    def is_read() -> bool:
        assert asking.poll() is None
        try:
            ends.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # by nobody yet
            return False
        return True

    def is_left() -> bool:
        try:
            os.write(ends[0], b" ")
        except BrokenPipeError:
            return True
        return False

    try:
        assert until(is_read, STARTS_WITHIN_S)
        assert not until(is_left, 0.5)
        asking.send_signal(how)
        assert asking.wait() == -how
        assert until(is_left, ENDS_WITHIN_S)
    finally:
        asking.kill()
        asking.wait()
        for end in ends:
            os.close(end)  # a worker that is still there reads the end of the file, and ends


def test_a_worker_whose_plan_has_ended_already_does_not_begin(tmp_path):
    command = [sys.executable, "-m", "parity.planning.worker", str(tmp_path / "found.json"), "0"]
    done = subprocess.run(command, input="{}", text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")


def test_it_imports_what_the_one_that_asks_does_whatever_lies_in_the_current_directory(tmp_path, monkeypatch):
    """A folder called as a package of ours would be taken for it; another checkout's model would be compiled."""
    (tmp_path / "loaders").mkdir()
    (tmp_path / "loaders" / "__init__.py").write_text("raise ImportError('not this one')")
    monkeypatch.chdir(tmp_path)
    run, seen = subprocess.run, []

    def imports(command, *, env, **_):
        seen.append(run([*command[: command.index("-m")], "-c", PRINTS], env=env, capture_output=True, text=True))
        return seen[-1]

    monkeypatch.setattr("parity.planning.plan.subprocess.run", imports)
    request = Request("it", None, None, chip_of("v5e"), Workload(rows=1, context=8, prompt=8, dtype="bfloat16"))
    _compiled(request, "2x2", {"tensor": 4}, Depths(1, 1, count=1, period=1, typical=range(1)))
    assert seen[0].stdout.strip() == loaders.__file__, seen[0].stderr
