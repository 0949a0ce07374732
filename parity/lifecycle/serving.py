"""Events of what serves around the weights: the draft, speculation, captured decoding, sleep."""

from __future__ import annotations

import numpy as np

from parity.events import Skipped
from parity.lifecycle.live_model import LiveModel, expect, same_bits


def draft(life: LiveModel) -> str:
    """A draft from before a change: torch's is of the model as it is now, JAX's of the model as it was, and refused."""
    _needs_draft(life)
    held = life.model.draft
    for change in (lambda: life.swap("B"), lambda: life.reload("B"), lambda: life.reload("A")):
        before = life.bench.drafted(life.model)
        change()
        with life.live.backend.scope():
            now = life.live.backend.to_numpy(held(**life.bench.prompt)[0])
        expected = before if life.live.keeps_old else life.bench.drafted(life.model)
        assert expected is not None
        expect(same_bits(now, expected), "a draft from before a change is of neither model")
        if life.live.keeps_old:
            _refused(life, held)
            held = life.model.draft
    return "equals a cold load's after swap and reload"


def _refused(life: LiveModel, held: object) -> None:
    try:
        life.bench.tokens(life.model, held)
    except ValueError as error:
        expect("version" in str(error), f"the error does not speak of versions: {error}")
    else:
        expect(False, "a draft of old weights drafted for new ones")


def speculate(life: LiveModel) -> str:
    _needs_draft(life)
    life.speculate()  # compiles
    compiled = life.live.compiled(life.model)
    for change in (lambda: life.reload("B"), lambda: life.swap("A"), lambda: life.reload("A")):
        change()
        life.speculate()
    expect(life.live.compiled(life.model) == compiled, "speculation was compiled again")
    return "the same tokens as without, after reload and swap"


def replay(life: LiveModel) -> str:
    """What was captured, or compiled, before a change goes on after it."""
    life.replay()
    captures = life.model.graphs.num_captures if life.live.captures else 0
    for change in (lambda: life.reload("B"), lambda: life.swap("A"), lambda: life.reload("A")):
        change()
        life.replay()
    if life.live.captures:
        expect(life.model.graphs.num_captures == captures, "a change of weights made graphs be captured anew")
        _batch_refused(life)
    return "equals a cold load's steps, after reload and swap"


def _batch_refused(life: LiveModel) -> None:
    """A batch that began before a reload cannot go on after it."""
    _, batch = life.model.graphs.prefill(**life.bench.prompt)
    life.reload("A")
    try:
        batch.decode(np.zeros(life.bench.rows, np.int64))
    except ValueError as error:
        expect("version" in str(error), f"the error does not speak of versions: {error}")
    else:
        expect(False, "a graph went on from a cache of old weights")


def nap(life: LiveModel) -> str:
    if not life.live.captures:
        raise Skipped("a JAX model is let go of, and loaded again")
    life.replay()
    life.nap()
    life.replay()
    life.reload("B")
    life.reload("A")
    life.replay()
    return "refuses to run, then the same bits; graphs are captured anew"


def _needs_draft(life: LiveModel) -> None:
    if not life.bench.has_draft:
        raise Skipped("the checkpoint holds no draft")
