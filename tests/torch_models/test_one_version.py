"""Weights that another thread changes in place while a call reads them: it raises, and nothing is of two versions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from padded_prompt import IDS, MASK

import torch_models
from parity.zoo import make_checkpoint
from parity.zoo.adapters import make_adapter
from torch_models import weights as life

SAYS = "another thread changed the weights or adapters while this call read them"
CALLS: dict[str, Callable[..., Any]] = {
    "forward": lambda model, _: model(IDS, MASK),
    "taps": lambda model, _: model.with_taps(IDS, MASK),
    "taps of steps": lambda model, _: model.with_taps(IDS, MASK, decode=1),
    "prefill": lambda model, _: model.prefill(IDS, MASK),
    "decode": lambda model, cache: model.decode(np.ones(len(IDS), int), cache),
    "generate": lambda model, _: model.generate(IDS, MASK, max_new_tokens=1),
    "generate by graphs": lambda model, _: model.generate(IDS, MASK, max_new_tokens=1, graphs=True),
    "draft": lambda model, _: model.draft(IDS, MASK),
    "draft and verify": lambda model, _: model.generate(IDS, MASK, max_new_tokens=2, draft=model.draft),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    path = tmp_path_factory.mktemp("versions")
    return [make_checkpoint("qwen3_5", path / str(seed), seed=seed) for seed in range(2)]


@pytest.fixture
def model(checkpoints: list[Path]) -> torch_models.Model:
    return torch_models.load(checkpoints[0], mtp=True)


def elsewhere(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def once_inside(model: torch_models.Model, work: Callable[[], object]) -> None:
    """Have another thread do it when the first of its layers is done next."""
    layer = next(iter(model.model.layers.values()))

    def hook(*_: object) -> None:
        handle.remove()
        elsewhere(work)

    handle = layer.register_forward_hook(hook)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_during_which_a_reload_comes_raises_and_the_next_is_of_the_new_version(
    model: torch_models.Model, checkpoints: list[Path], call: str
) -> None:
    _, cache = model.prefill(IDS, MASK)
    if "graphs" in call:
        CALLS[call](model, cache)  # none is captured meanwhile
    once_inside(model, lambda: model.update_weights_from_disk(checkpoints[1]))
    says = "the cache holds keys and values of other weights" if "steps" in call else SAYS  # of the next step
    with pytest.raises((RuntimeError, ValueError), match=says):
        CALLS[call](model, cache)
    assert model.version == 2
    assert torch.equal(model(IDS, MASK), torch_models.load(checkpoints[1])(IDS, MASK))


@pytest.mark.parametrize("change", ["swap", "attach", "a reload that breaks"])
def test_any_change_of_weights_or_adapters_counts(
    model: torch_models.Model, checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    def work() -> None:
        if change == "swap":
            model.set_embed_and_head(embed=torch.zeros(model.get_parameter("model.embed_tokens.weight").shape))
        elif change == "attach":
            model.attach_lora(make_adapter(checkpoints[0], tmp_path / "adapter"))
        else:
            monkeypatch.setattr(life, "derive", lambda model: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model.update_weights_from_disk(checkpoints[1])

    once_inside(model, work)
    with pytest.raises(RuntimeError, match=SAYS):
        model(IDS, MASK)


def test_what_is_changed_while_it_is_exported_leaves_nothing_behind(
    model: torch_models.Model, checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, stored = 0, life.stored

    def read(*args: Any) -> torch.Tensor:
        nonlocal reads
        reads += 1
        if reads == 5:
            monkeypatch.setattr(life, "stored", stored)
            elsewhere(lambda: model.update_weights_from_disk(checkpoints[1]))
        return stored(*args)

    for attempt in (lambda: model.export(tmp_path / "it"), model.digests):
        reads = 0
        monkeypatch.setattr(life, "stored", read)
        with pytest.raises(RuntimeError, match=SAYS):
            attempt()
    assert list(tmp_path.iterdir()) == []
    assert model.version == 3


def test_of_weights_that_are_a_mixture_there_are_no_digests(
    model: torch_models.Model, checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(life, "derive", lambda model: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.update_weights_from_disk(checkpoints[1])
    with pytest.raises(RuntimeError, match="the model refuses to run"):
        model.digests()
    model.update_weights_from_disk(checkpoints[1])
    assert model.digests() == torch_models.load(checkpoints[1], mtp=True).digests()
