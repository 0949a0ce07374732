"""Captured decoding on trial: whatever happened since, a replay gives what a cold load gives eagerly, or is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from loaders import open_checkpoint
from parity.mutants.bench import Bench, Subject, load
from parity.zoo import prompts

ROWS, CAPACITY, TOKENS, STEPS = 3, 32, 24, 3  # rows of a graph of four


def replay(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """The life of captured graphs; the first thing that goes wrong."""
    paths = [bench.path(subject, seed) for seed in (0, 1)]
    batch = prompts(open_checkpoint(paths[0]).config, rows=ROWS, tokens=TOKENS, padding="left", seed=5)
    a, b = paths
    eager = {path: bench.once(("eager", path), partial(_eager, path, batch)) for path in paths}
    finding = next(_life(a, b, eager, batch), None)
    return [finding] if finding else []


def _eager(path: Path, batch: dict[str, np.ndarray]) -> list[np.ndarray]:
    """A cold load's logits of the prompt and of every step, without graphs; padded rows as graphs have them."""
    from torch_models.graphs import row_bucket

    model = load("torch", path)
    rows = row_bucket(ROWS)
    cache = model.empty_cache(rows, CAPACITY)
    prompt = model.checked_prompt(**batch)
    found = [model.prefill_into(prompt, cache.first_rows(ROWS)).numpy().copy()]
    for _ in range(STEPS):
        token_B = np.pad(found[-1].argmax(-1), (0, rows - ROWS))
        found.append(model.decode(token_B, cache)[0][:ROWS].numpy().copy())
    return found


def _life(a: Path, b: Path, eager: dict[Path, list[np.ndarray]], batch: dict[str, np.ndarray]) -> Iterator[str]:
    model = load("torch", a)

    def run(when: str, path: Path) -> Iterator[str]:
        logits, running = model.graphs.prefill(**batch, max_new_tokens=CAPACITY - TOKENS)
        found = [logits.numpy().copy()]
        for _ in range(STEPS):
            found.append(running.decode(found[-1].argmax(-1)).numpy().copy())
        wrong = [step for step, pair in enumerate(zip(found, eager[path], strict=True)) if not np.array_equal(*pair)]
        if wrong:
            yield f"{when}, replayed logits differ from a cold load's from step {wrong[0]} on"
        batches.append(running)

    def refused(when: str, running: Any) -> Iterator[str]:
        if not _raises(lambda: running.decode(np.zeros(ROWS, np.int64))):
            yield f"{when}, a replay was not refused"

    batches: list[Any] = []
    yield from run("after the capture", a)
    yield from run("in a second batch", a)
    yield from refused("when a later batch took the cache", batches[0])
    for path in (b, a):
        captures = model.graphs.num_captures
        model.update_weights_from_disk(path)
        yield from refused("with a cache of old weights", batches[-1])
        yield from run("after a reload", path)
        if model.graphs.num_captures != captures:
            yield "a reload made a graph be captured anew"
    param = model.decoder.norm.weight
    kept = param.data
    param.data = kept.clone()
    yield from refused("with a parameter elsewhere", batches[-1])
    param.data = kept
    yield from _hidden(a, batch, refused)
    yield from run("before sleep", a)
    model.sleep()
    if len(model.graphs):
        yield "a model that sleeps keeps its graphs"
    yield from refused("of a model that sleeps", batches[-1])
    model.wake()
    yield from refused("captured before sleep", batches[-1])
    yield from run("after waking up", a)


def _hidden(path: Path, batch: dict[str, np.ndarray], refused: Callable[[str, Any], Iterator[str]]) -> Iterator[str]:
    """Tensors that no module registers, held by an attribute and by a closure, rebound after the capture."""
    import torch

    for where in ("an attribute", "a closure"):
        model = load("torch", path)
        factor, kernel = torch.ones(()), SimpleNamespace(factor=torch.ones(()))

        def scaled(module: Any, args: Any, out: Any) -> Any:
            return out * factor  # noqa: B023  (rebinding it is the point)

        def scaled_by_attribute(module: Any, args: Any, out: Any) -> Any:
            return out * module.kernel.factor

        model.decoder.norm.kernel = kernel
        model.decoder.norm.register_forward_hook(scaled if where == "a closure" else scaled_by_attribute)
        _, running = model.graphs.prefill(**batch, max_new_tokens=CAPACITY - TOKENS)
        running.decode(np.zeros(ROWS, np.int64))
        if where == "a closure":
            factor = torch.full((), 2.0)
        else:
            kernel.factor = torch.full((), 2.0)
        yield from refused(f"with a tensor of {where} elsewhere", running)


def _raises(act: Callable[[], object]) -> bool:
    with contextlib.suppress(RuntimeError, ValueError):
        act()
        return False
    return True
