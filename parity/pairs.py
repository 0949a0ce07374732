"""Two backends of one checkpoint on one batch: all at once, and then decoding; each beside its own oracle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from loaders import Checkpoint, open_checkpoint
from loaders.host.multimodal import NAMES as MULTIMODAL
from loaders.host.multimodal import check_inputs
from loaders.host.stepwise import stepwise
from parity.asserting import Oracle
from parity.backends import Framework
from parity.compare import compare
from parity.comparison.outcome import Comparison
from parity.record import default_inputs, load_model, record_model, row_alone
from parity.trace import Trace

ONLY_DECODED = (
    "All tokens at once pass, so suspect what only decoding does: the cache, the positions of new tokens, the state"
    " that one step hands to the next."
)
DECODE = 8  # tokens of every row: few, since each is a step


@dataclass(frozen=True)
class Runs:
    """What comparing two backends found.

    Attributes:
        comparisons: with titles: of all tokens at once; then of the last ones decoded, where they were: of all rows,
            and of the first alone.
        notes: what a reader should know beside them.
    """

    comparisons: tuple[tuple[str, Comparison], ...]
    notes: tuple[str, ...] = ()


def run_pair(
    uri: str | os.PathLike[str],
    sides: tuple[Framework, Framework],
    inputs: Mapping[str, np.ndarray] | None = None,
    *,
    decode: int | None = None,
    probes: int | None = None,
    mtp: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    source: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    weight_only: bool = False,
    **options: Any,
) -> Runs:
    """Load a checkpoint into both, record each twice, and compare: what ``tandem run`` does.

    Args:
        uri: the checkpoint.
        sides: ours, and the peer.
        inputs: of both; None: ``default_inputs``.
        decode: how many of the last tokens of every row to read one at a time in the second comparison; 0: make none;
            None: ``DECODE``, fewer of short rows, and none where they cannot be decoded, which a note says.
        probes: see ``record_oracle``.
        mtp: also run the checkpoint's draft.
        adapter: for every row.
        source: file that the inputs are from, so that a failure can name the command that shows it again.
        dtype: computed in; None: the checkpoint's own.
        weight_only: round neither inputs nor keys and values.
        options: of ``record_model``, for all tokens at once.
    Raises:
        ValueError: rows that cannot be decoded as was asked.
    """
    checkpoint = open_checkpoint(uri)
    inputs = default_inputs(checkpoint) if inputs is None else inputs
    steps, notes = _steps(checkpoint, inputs, decode)
    name = " against ".join(framework.name for framework in sides)
    passes = [_Pass(name, inputs, 0)]
    if steps:
        passes.append(_Pass(f"{name}, the last {steps} tokens decoded", inputs, steps))
        if len(inputs["input_ids"]) > 1 and inputs.keys() <= {"input_ids", "attention_mask"}:
            # a single row is multiplied by other kernels than a batch
            passes.append(_Pass(f"{name}, row 0 decoded alone", row_alone(inputs, 0), steps, row=0))
    for framework in sides:
        model = load_model(uri, framework, dtype=dtype, mtp=mtp, weight_only=weight_only, adapter=adapter)
        for one in passes:
            how = {"decode": steps} if one.decode else {"mtp": mtp, **options}
            known = passes[0].traces[-1] if one.decode else None
            trace = record_model(model, framework, one.inputs, weights_of=known, **how)
            trace.meta |= {"inputs": str(source)} if source else {}
            trace.meta |= {} if one.row is None else {"row": one.row}
            one.traces.append(trace)
    common = {"mtp": mtp, "adapter": adapter}
    asked, plain = Oracle(checkpoint, probes=probes, **common), Oracle(checkpoint, probes=0, **common)
    found: list[tuple[str, Comparison]] = []
    for one in passes:
        a, b = one.traces
        of_a = (asked if one.row is None else plain)(one.inputs, a)  # faults need every row to be seen
        is_sparse = any(name.startswith("routing.") for name in b.tensors)
        of_b = plain(one.inputs, b) if is_sparse else of_a  # each side is held against its own expert choices
        judged = compare(a, b, of_a, oracle_b=of_b)
        if one.decode and (found[0][1].verdict, judged.verdict) == ("PASS", "FAIL"):
            judged = replace(judged, summary=f"{judged.summary} {ONLY_DECODED}")
        found.append((one.title, judged))
    return Runs(tuple(found), notes)


@dataclass
class _Pass:
    """One way to read the inputs, and what each side computed so."""

    title: str
    inputs: Mapping[str, np.ndarray]
    decode: int
    row: int | None = None
    traces: list[Trace] = field(default_factory=list)


def _steps(checkpoint: Checkpoint, inputs: Mapping[str, np.ndarray], asked: int | None) -> tuple[int, tuple[str, ...]]:
    """How many tokens to decode, and why there are none where none was asked for."""
    if asked == 0:
        return 0, ()
    text = (inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids"))
    given = {name: inputs[name] for name in MULTIMODAL if name in inputs}
    checked = check_inputs(checkpoint.config, *text, given=given)
    steps = min(DECODE, int(checked.attention_mask.sum(axis=1).min()) - 1) if asked is None else asked
    try:
        stepwise(checkpoint.config, checked, text[0], position_ids=text[2], given=given, steps=steps)
    except ValueError as error:
        if asked is not None:
            raise
        return 0, (f"decoding was not compared: {error}.",)
    return steps, ()
