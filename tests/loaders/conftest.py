"""What tests of several sources share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from loaders.sources import objects, runai


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that says nothing is given up within a second or two."""
    monkeypatch.setattr(objects, "CONNECT_S", 1)
    monkeypatch.setattr(objects, "READ_S", 1)
    monkeypatch.setattr(objects, "ATTEMPTS", 2)
    monkeypatch.setattr(runai, "DEADLINE_S", 1.0)
    monkeypatch.setattr(runai, "CLOSE_S", 0.2)


@pytest.fixture
def no_hanging() -> Iterator[None]:
    """Opening a checkpoint takes no longer than 20 seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError("opening a checkpoint hung")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
