"""What tests of several sources share."""

from __future__ import annotations

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
