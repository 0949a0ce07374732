"""How far reading is: a bar where a person looks on, nothing where none does, and lines of the log from both loads."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders.reading.progress import reported
from parity.zoo import make_checkpoint


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tensors(count: int = 4) -> Iterator[tuple[str, np.ndarray]]:
    yield from ((f"t{number}", np.full(1 << 18, number, np.uint8)) for number in range(count))


def test_what_passes_is_what_came() -> None:
    for stream in (Terminal(), io.StringIO()):
        found = list(reported(tensors(), 1 << 20, "c", stream))
        assert [(name, int(array[0])) for name, array in found] == [(f"t{number}", number) for number in range(4)]


def test_a_terminal_shows_bytes_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    passing = reported(tensors(8), 1 << 21, "the-checkpoint", stream)
    for _ in range(5):
        next(passing)
    import_module("time").sleep(0.25)  # it is drawn ten times a second
    next(passing)
    shown = stream.getvalue()
    assert "the-checkpoint" in shown
    assert re.search(r"1\.\d/2\.\d MB", shown), shown
    assert re.search(r"\d [kMG]B/s", shown), shown
    assert re.search(r"\d:\d\d:\d\d", shown), shown
    list(passing)


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, object(), closed()], ids=["none", "a stand-in", "closed"])
def test_a_process_without_a_usual_stderr_loads_as_any(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    assert len(list(reported(tensors(), 1 << 20, "c"))) == 4


@pytest.mark.parametrize("is_shared", [False, True], ids=["a file", "the terminal"])
def test_what_a_program_prints_meanwhile_stays_where_it_goes(is_shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout, stderr = Terminal() if is_shared else io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    passing = reported(tensors(), 1 << 20, "c", stderr)
    next(passing)
    print("a result")
    list(passing)
    assert "a result" in (stderr if is_shared else stdout).getvalue()


def test_nothing_is_shown_where_nobody_looks_or_rich_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    list(reported(tensors(), 1 << 20, "c", stream))
    assert stream.getvalue() == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    stream = Terminal()
    list(reported(tensors(), 1 << 20, "c", stream))
    assert stream.getvalue() == ""


def test_an_abandoned_one_says_how_far_it_came_and_holds_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loaders.reading.progress")
    passing = reported(tensors(), 1 << 20, "c", Terminal())
    next(passing)
    next(passing)
    passing.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert "read: 0.000 of 0.001 GB of c in" in caplog.text


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_loads_and_reloads_log_a_line_per_phase_and_write_nothing_else(
    backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    path = make_checkpoint("qwen3", tmp_path / "c", num_hidden_layers=1)
    caplog.set_level(logging.INFO)
    model = import_module(f"{backend}_models").load(path)
    derive = ["derive"] if backend == "torch" else []
    ours, phases = told(caplog)
    assert phases == ["plan", "read", "place", *derive, "publish"]
    assert str(path) in ours[0]
    caplog.clear()
    model.update_weights_from_disk(path, donate=True)
    ours, phases = told(caplog)
    assert phases == ["plan", "check", "read", *derive, "publish"]
    assert ours[-1] == "publish: version 2 (reload)"
    assert capfd.readouterr() == ("", "")


def told(caplog: pytest.LogCaptureFixture) -> tuple[list[str], list[str]]:
    """Lines of our own, and the phase that each is of."""
    ours = [record.getMessage() for record in caplog.records if record.name.split(".")[0] in (*sys_modules(),)]
    return ours, [message.partition(":")[0] for message in ours]


def sys_modules() -> set[str]:
    return {"loaders", "torch_models", "jax_models"} & set(sys.modules)
