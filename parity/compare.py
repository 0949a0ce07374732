"""Compare two traces: what users ask is "rounding or bug, where, and whose?".

NumPy and safetensors alone, so a trace from a TPU job is compared wherever a person or a CI runner sits.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from parity import trace_layout
from parity.comparison.case import Case
from parity.comparison.comparability import find_reasons
from parity.comparison.decidable import LOGITS, compare_generated, count_top1, picks
from parity.comparison.divergence import first_divergence
from parity.comparison.findings import Probe, TensorRow
from parity.comparison.nearest import parts_of
from parity.comparison.outcome import Comparison
from parity.comparison.profile import profile
from parity.comparison.router_flips import Router, study
from parity.comparison.rows import judge_tensor
from parity.comparison.sensitivity import study_probes
from parity.comparison.verdict import Evidence, decide
from parity.reproduce import bisect_command
from parity.trace import Trace
from parity.wording import joined

Given = Trace | str | os.PathLike[str]


def compare(a: Given, b: Given, oracle: Given | None = None, *, oracle_b: Given | None = None) -> Comparison:
    """Hold two traces, or the files they are in, against each other and, when there is one, against an oracle.

    The comparison keeps the traces, so that one can look closer at a token of them.

    Args:
        a: ours.
        b: the peer, whose own rounding sets the tolerance; both directions are checked.
        oracle: float64 reference on the same stored weights. Without it only the distance of a and b can be judged,
            so a failure is known but not whose it is.
        oracle_b: the reference of b where it is another one: sparse models get one per backend, each with that
            backend's routing replayed. Default: ``oracle``.

    Raises:
        ValueError: an oracle for b and none for a, or something that is not a trace, or not a file of one; lists
            everything wrong with it.
    """
    if oracle is None and oracle_b is not None:
        raise ValueError("oracle_b was given without oracle: pass the oracle of the first trace as well.")
    a, b = _opened(a), _opened(b)
    oracle = None if oracle is None else _opened(oracle)
    oracle_b = oracle if oracle_b is None else _opened(oracle_b)
    oracles = {} if oracle is None else {"the oracle": oracle}
    if oracle_b is not None and oracle_b is not oracle:
        oracles["the oracle of the second trace"] = oracle_b
    for label, trace in {"the first trace": a, "the second trace": b, **oracles}.items():
        problems = trace_layout.find_problems(trace.tensors, trace.meta)
        if problems:
            raise ValueError(f"{label} is not usable: {' '.join(problems)}")
    reasons, notes = find_reasons(a, b, oracles)
    case = Case(a, b, oracle, oracle_b)
    if reasons:
        headline = f"{case.labels[0]} and {case.labels[1]} cannot be compared"
        told = [f"({number}) {text}" if len(reasons) > 1 else text for number, text in enumerate(reasons, 1)]
        summary = f"{headline}: {' '.join(told)}"
        return Comparison(
            verdict="INVALID",
            headline=headline,
            summary=summary,
            labels=case.labels,
            meta=_meta(case),
            dtype=str(a.meta["dtype"]),
            reasons=tuple(reasons),
            notes=tuple(notes),
        )
    return replace(_judge(case, notes), case=case)


def _opened(given: Given) -> Trace:
    return given if isinstance(given, Trace) else Trace.load(given)


def _judge(case: Case, notes: list[str]) -> Comparison:
    router = study(case)
    rows: list[TensorRow] = []
    pictures: dict[str, np.ndarray] = {}
    for name in case.names:
        row, pictures[name] = judge_tensor(case, name, router.keep(case, name))
        rows.append(row)
    found = ()
    keep = router.keep(case, LOGITS)
    if LOGITS in case.names and not any(row.nonfinite for row in rows if row.name == LOGITS):
        found = picks(case, keep)
    evidence = Evidence(
        labels=case.labels,
        limits=case.limits,
        dtype=case.a.meta["dtype"],
        rows=tuple(rows),
        divergence=first_divergence(case, rows),
        top1=count_top1(found, keep),
        generated=compare_generated(case, found, keep, router),
        routing=router.report,
        probes=study_probes(case, rows, router),
        after=case.a.meta.get("after"),
        has_digests=_has_digests(case),
    )
    looks = profile(case, evidence.rows, evidence.divergence, router, evidence.top1, router.report)
    decision = decide(evidence)
    has_failed = decision.verdict == "FAIL"
    command = bisect_command(case, evidence.divergence) if has_failed else None
    return Comparison(
        verdict=decision.verdict,
        cause=decision.cause,
        whose=decision.whose,
        headline=decision.headline,
        summary=decision.summary,
        labels=case.labels,
        meta=_meta(case),
        dtype=evidence.dtype,
        num_layers=case.num_layers,
        limits=case.limits,
        rows=evidence.rows,
        worst_token=_worst_token(evidence),
        divergence=evidence.divergence,
        top1=evidence.top1,
        generated=evidence.generated,
        routing=router.report,
        probes=evidence.probes,
        profile=looks if has_failed else None,
        parts=_parts(case),
        text_path=case.text_path,
        commands=(command,) if command else (),
        reasons=decision.reasons,
        notes=tuple(notes + _notes(case, router, evidence.probes, has_failed=has_failed)),
        token_used=pictures,
    )


def _worst_token(evidence: Evidence) -> Any:
    """Of the first tensor that fails, since later ones inherit from it; else the one nearest to its limit."""
    for row in evidence.rows:
        if evidence.divergence and row.name == evidence.divergence.tensor:
            return row.worst_token
    tokens = [row.worst_token for row in evidence.rows if row.worst_token]
    return min(tokens, key=lambda token: token.margin, default=None)


def _parts(case: Case) -> tuple[str, ...] | None:
    """What is known of the architecture; None where the traces say nothing of it."""
    routers = {".mlp.gate"} if trace_layout.routing_layers(case.a.tensors) else set()
    return tuple(sorted(parts_of(case.modules) | routers)) if case.modules else None


def _has_digests(case: Case) -> bool:
    return all(trace.meta.get("weights") for trace in (case.a, case.b))


def _notes(case: Case, router: Router, probes: tuple[Probe, ...], *, has_failed: bool) -> list[str]:
    """What a reader should know beside the verdict; of a failure not what else would have been seen."""
    notes = []
    if case.oracle_a is None:
        notes.append(
            "no oracle: whose an error is, whether one below the limit is rounding, and how small a fault would have"
            " been seen, is unknown."
        )
    else:
        direct = [name for name in case.names if not case.has_oracle(name)]
        if not case.oracle_a.meta.get("probes") and not has_failed:
            notes.append("the oracle tried no faults, so how small a one this run would have seen is unknown.")
        if direct:
            lacking = joined([case.module_of(name) for name in direct])
            notes.append(f"the oracle lacks {lacking}: only the distance of the two is judged there.")
    absorbed = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", probe.module) for probe in probes if probe.kind == "noise")
    if absorbed and not has_failed:
        digests = ", and are equal" if _has_digests(case) else ", but are not in both traces"
        notes.append(
            f"a wrong scale of {joined(list(absorbed))} is taken out again by a norm behind it, so no activation shows"
            f" it: digests of the weights do{digests}."
            " Noise was tried there instead."
        )
    traces = {"the first trace": case.a, "the second trace": case.b, "the oracle": case.oracle_a}
    sparse = {label: bool(trace_layout.routing_layers(t.tensors)) for label, t in traces.items() if t is not None}
    if any(sparse.values()) and not all(sparse.values()):
        lacking = " and ".join(label for label, has in sparse.items() if not has)
        notes.append(f"{lacking} recorded no routing: router flips against it are not seen.")
    if router.report and router.report.excluded:
        counts = f"{router.report.excluded} of {router.report.tokens}"
        notes.append(f"{counts} tokens follow a router flip and are not judged.")
    if not trace_layout.hidden_layers(case.a.tensors):
        notes.append("no hidden states: the number of layers is unknown, so the absolute limit is that of one layer.")
    return notes


def _meta(case: Case) -> tuple[dict[str, Any], ...]:
    """Facts about the traces for people: the documents without digests and event logs, which have their own place."""
    out = []
    for trace in (case.a, case.b, case.oracle_a):
        if trace is not None:
            facts = {key: value for key, value in trace.meta.items() if key not in ("weights", "events", "schema")}
            weights = trace.meta.get("weights")
            out.append({**facts, "root": weights["root"] if weights else None, "shape": list(trace.shape)})
    return tuple(out)


class _Callable(ModuleType):
    """Importing this module binds it as ``parity.compare``, over the function of that name: so it can be called too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Comparison:
        return compare(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
