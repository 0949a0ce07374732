"""``assert_parity``: hold two backends, or two traces, against each other, and say in ten lines what is wrong.

Needs no pytest. The plugin watches (``parity.watching``), so that every comparison of a test lands in its report.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loaders import Checkpoint, open_checkpoint
from parity.assertion_text import failure
from parity.backend import Backend, Inputs, on_host, record_backend
from parity.compare import compare
from parity.comparison.outcome import Comparison
from parity.trace import Trace, input_hash
from parity.watching import tell

Runs = Trace | Backend | str | os.PathLike[str]  # a path is a trace file's


class Oracle:
    """The float64 oracle of one checkpoint; what it has said about a batch it says again at once.

    Attributes:
        checkpoint: whose stored weights it computes with.
        options: of ``record_oracle``: a draft, an adapter, how many faults to try.
    """

    def __init__(self, checkpoint: Checkpoint | str | os.PathLike[str], **options: Any) -> None:
        self.checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
        self.options = options
        self._said: dict[str, Trace] = {}

    def __call__(self, inputs: Inputs, like: Trace | None = None) -> Trace:
        """What it says about ``inputs``, with the expert choices of ``like`` replayed; of the same choices once."""
        from parity.record_oracle import record_oracle  # the oracle of every family; not needed to compare two traces

        chosen = {} if like is None else {n: x[like.mask] for n, x in like.tensors.items() if n.startswith("routing.")}
        key = input_hash(**inputs) + (input_hash(0, **chosen) if chosen else "")
        if key not in self._said:
            self._said[key] = record_oracle(self.checkpoint, inputs, like=like, **self.options)
        return self._said[key]


Judge = Trace | Checkpoint | Oracle | str | os.PathLike[str]  # a path is a checkpoint directory's or a trace file's


@dataclass(frozen=True)
class Held:
    """Two runs that were held against each other.

    Attributes:
        title: what a report calls it.
        comparison: what was found.
        traces: ``a``, ``b`` and, with an oracle, ``oracle`` and ``oracle_b``: what it was found from.
        is_asserted: whether anything but a PASS is an error.
    """

    title: str
    comparison: Comparison
    traces: Mapping[str, Trace]
    is_asserted: bool = True


def assert_parity(
    a: Runs, b: Runs, oracle: Judge | None = None, *, inputs: Inputs | None = None, title: str | None = None
) -> Comparison:
    """Raise unless two runs agree to within rounding.

    Args:
        a: ours: a backend to run, a trace, or a trace file.
        b: the peer, likewise.
        oracle: a trace of it, a checkpoint or its directory, or an ``Oracle``. Sparse models get one for each side,
            with that side's expert choices replayed. Without one, whose an error is cannot be known.
        inputs: what backends are run on, and a checkpoint's oracle; default: those of ``tandem run`` for the
            checkpoint that the oracle or a backend names.
        title: what a report calls it; default: the two backends' names.
    Returns:
        The comparison, whose verdict is PASS.
    Raises:
        AssertionError: any other verdict, inconclusive ones too.
        ValueError: inputs are needed and nothing says which; something is neither a trace nor a backend.
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    held, reproduce = hold(a, b, oracle, inputs=inputs, title=title)
    if held.comparison.verdict != "PASS":
        raise AssertionError(failure(held.comparison, reproduce))
    return held.comparison


def hold(
    a: Runs,
    b: Runs,
    oracle: Judge | None = None,
    *,
    inputs: Inputs | None = None,
    title: str | None = None,
    is_asserted: bool = True,
) -> tuple[Held, str]:
    """As ``assert_parity``, whatever the verdict; also the command that finds the same again."""
    if isinstance(oracle, str | os.PathLike):
        oracle = Trace.load(oracle) if Path(oracle).is_file() else Oracle(oracle)
    if isinstance(oracle, Checkpoint):
        oracle = Oracle(oracle)
    is_run = [not isinstance(side, Trace | str | os.PathLike) for side in (a, b)]
    is_default = inputs is None and all(is_run)
    if inputs is None and (any(is_run) or isinstance(oracle, Oracle)):
        inputs = _default_inputs(a, b, oracle)
    inputs = None if inputs is None else on_host(inputs)
    runs = [_trace(side, inputs) for side in (a, b)]
    traces: dict[str, Trace] = {"a": runs[0], "b": runs[1]}
    if isinstance(oracle, Oracle):
        assert inputs is not None
        traces |= {"oracle": oracle(inputs, runs[0]), "oracle_b": oracle(inputs, runs[1])}
    elif oracle is not None:
        traces["oracle"] = oracle
    comparison = compare(runs[0], runs[1], traces.get("oracle"), oracle_b=traces.get("oracle_b"))
    held = Held(title or f"{runs[0].backend} against {runs[1].backend}", comparison, traces, is_asserted)
    return held, tell(held) or _command(held, is_default=is_default)


def _trace(side: Any, inputs: Inputs | None) -> Trace:
    if isinstance(side, str | os.PathLike):
        return Trace.load(side)
    if isinstance(side, Trace):
        return side
    if not isinstance(side, Backend):
        how = "A torch module, a JAX function or a transformers model becomes a backend in parity.foreign."
        if hasattr(side, "with_taps"):
            name = "jax" if type(side).__module__.startswith("jax") else "torch"
            how = f"One of our models becomes one: parity.ModelBackend(model, parity.backends.open_backend({name!r}))."
        raise ValueError(
            f"{type(side).__name__} is neither a trace, a trace file nor a backend, expected one of them. {how}"
        )
    assert inputs is not None
    return record_backend(side, inputs)


def _default_inputs(a: Any, b: Any, oracle: Any) -> Mapping[str, np.ndarray]:
    """Those of a checkpoint that one of the three names."""
    from parity.record import default_inputs

    if isinstance(oracle, Oracle):
        return default_inputs(oracle.checkpoint)
    named = [side.info.checkpoint for side in (a, b) if not isinstance(side, Trace | str | os.PathLike)]
    checkpoint = next(filter(None, named), None)
    if checkpoint is None:
        raise ValueError("nothing says what to run: give inputs={'input_ids': ...}, or an oracle's checkpoint")
    return default_inputs(open_checkpoint(checkpoint))


def _command(held: Held, *, is_default: bool) -> str:
    """What finds the same again outside of pytest. ``is_default``: the inputs are those of ``tandem run``."""
    a, b = held.traces["a"], held.traces["b"]
    uri, ours = a.meta.get("checkpoint"), {"jax", "torch"}
    is_plain = not any((trace.meta.get("precision") or {}).get("adapter") for trace in (a, b))
    if is_default and is_plain and uri and {a.backend, b.backend} <= ours and a.meta["dtype"] == b.meta["dtype"]:
        return f"tandem run {shlex.quote(uri)} --a {a.backend} --b {b.backend} --dtype {a.meta['dtype']}"
    return "Trace.save both, then: tandem compare a.trace b.trace --oracle oracle.trace"
