"""Whole parameters in new memory: when it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loaders import open_checkpoint, stream
from loaders.reading import memory, scratch, whole
from loaders.reading.filling import Filling
from loaders.reading.plan import plan_load
from loaders.sources.positioned import LocalFile
from loaders.stage import Stage
from parity.zoo import make_checkpoint


@pytest.mark.parametrize("staged", [False, True])
def test_memory_of_parameters_that_stay_is_mapped_before_anything_is_read_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staged: bool
) -> None:
    """Mapping would wait for the threads that write to what is mapped already; what is on its way only is not kept."""
    plan = plan_load(open_checkpoint(make_checkpoint("qwen3-moe", tmp_path / "it")), Stage()).within(
        None, staged=staged
    )
    # little at once, or all of so small a model is asked for before the first of it is read
    monkeypatch.setattr(memory, "STAGING_BYTES", 1 << 10)
    monkeypatch.setattr(stream, "WINDOW_BYTES", 1 << 12)
    done: list[str] = []
    make_memory, scatter_into = scratch.aligned_empty, LocalFile.scatter_into

    def mapped(*arguments: Any) -> np.ndarray:
        done.append("map")
        return make_memory(*arguments)

    def read(*arguments: Any) -> None:
        done.append("read")
        scatter_into(*arguments)

    monkeypatch.setattr(scratch, "aligned_empty", mapped)
    monkeypatch.setattr(LocalFile, "scatter_into", read)
    found = [spec.name for spec, _ in whole.read_whole(Filling(plan))]
    count = len(found)
    assert set(found) == {spec.name for spec in plan.specs}
    assert done.count("map") == count
    assert (done[:count] == ["map"] * count) is not staged
    assert "read" in done
