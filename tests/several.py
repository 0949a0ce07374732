"""Programs that run several times at once, as the processes or ranks of one mesh; tests start them and ask what came.

A program is given ``job.json`` and its number, and calls ``answer``. What is found is compared by the test.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from loaders.sources.local import LocalDirectory, LocalFile

TIMEOUT_S = 900  # of a process, on a machine that does something else too
LEFT_S = 60  # for the others when one has failed


def run_several(
    program: Path,
    job: Mapping[str, Any],
    directory: Path,
    count: int,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """What each of ``count`` processes of ``program`` answers; fails with their logs, or when one does not end."""
    (directory / "job.json").write_text(json.dumps({**job, "directory": str(directory), "count": count}))
    command = [sys.executable, str(program), str(directory / "job.json")]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    around = os.environ | {"PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"} | dict(environment)
    logs = [directory / f"log{index}" for index in range(count)]
    children = []
    for index, log in enumerate(logs):
        with log.open("w") as out:
            children.append(subprocess.Popen([*command, str(index)], env=around, stdout=out, stderr=out))
    has_failed, until = False, time.monotonic() + TIMEOUT_S
    try:
        while any(child.poll() is None for child in children):
            if any(child.poll() for child in children) and not has_failed:
                has_failed, until = True, min(until, time.monotonic() + LEFT_S)
            assert time.monotonic() < until, "\n".join(log.read_text()[-4000:] for log in logs)
            time.sleep(0.1)
    finally:
        for child in children:
            child.kill()
            child.wait()
    ended = [child.returncode for child in children]  # minus the signal that ended one, which may say nothing
    assert not any(ended), "\n".join([f"ended with {ended}", *(log.read_text()[-4000:] for log in logs)])
    return [json.loads((directory / f"found{index}.json").read_text()) for index in range(count)]


def free_port() -> int:
    """On loopback, for the processes to find each other at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def asked() -> tuple[dict[str, Any], int]:
    """In a program: its job, and its number."""
    return json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])


def answer(job: Mapping[str, Any], index: int, found: Mapping[str, Any]) -> None:
    """In a program: hand over what was found, as JSON."""
    (Path(job["directory"]) / f"found{index}.json").write_text(json.dumps(found))


def error_of(work: Callable[[], Any]) -> str:
    """What it raises, as text."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 - it is the result
        return f"{type(error).__name__}: {error}"
    return "none"


class BytesRead:
    """Counts what is read of local files, from here on and for good; no more is read than is asked for."""

    def __init__(self) -> None:
        self.count = 0
        plain = LocalFile.scatter_into

        def counted(file: LocalFile, outs: Sequence[memoryview], position: int) -> None:
            self.count += sum(map(len, outs))
            plain(file, outs, position)

        LocalFile.scatter_into = counted
        LocalDirectory.gap_bytes = 0  # rows of these models are shorter than a page


def error(found: Any, expected: Any) -> float:
    """Relative, of all numbers together."""
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))
