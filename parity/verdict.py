"""From what was measured to one verdict, one cause and one sentence: rounding or bug, where, and whose?"""

from __future__ import annotations

from dataclasses import dataclass

from parity.comparison import Verdict
from parity.findings import Divergence, Generated, Probe, Routing, TensorRow, Top1
from parity.nearest import Likeness
from parity.ruler import MIN_REMAINING, Cause, Limits, Side
from parity.trace_layout import layer_of


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything a verdict is made from."""

    labels: tuple[str, str]
    limits: Limits
    dtype: str
    rows: tuple[TensorRow, ...]
    divergence: Divergence | None
    top1: tuple[Top1, ...]
    generated: Generated | None
    routing: Routing | None
    probes: tuple[Probe, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    verdict: Verdict
    summary: str
    cause: Cause | None = None
    whose: Side | None = None
    reasons: tuple[str, ...] = ()


def decide(evidence: Evidence) -> Decision:
    """The first that applies, the surest evidence first: a failure outranks what could not be decided."""
    for rule in (_nonfinite, _tensors, _top1, _generated, _router, _factor, _undecided):
        decision = rule(evidence)
        if decision is not None:
            return decision
    return _passed(evidence)


def _nonfinite(evidence: Evidence) -> Decision | None:
    row = next((row for row in evidence.rows if row.nonfinite), None)
    if row is None:
        return None
    who = _who(evidence, row.blame)
    return Decision("FAIL", f"Bug in {who}: {row.name}{_place(row.layer)} has {row.nonfinite}.", "bug", row.blame)


def _tensors(evidence: Evidence) -> Decision | None:
    failing = [row for row in evidence.rows if row.verdict == "FAIL"]
    if not failing or evidence.divergence is None:
        return None
    first, where = failing[0], _where(evidence.divergence)
    if first.basis == "direct":
        summary = (
            f"Bug, but whose is unknown without an oracle: the two are {failing[0].direct:.2g} apart {where}, more than"
            f" both can be off by rounding ({first.limit:.2g}). {_story(evidence)} Pass an oracle to learn whose."
        )
        return Decision("FAIL", summary, "bug", None)
    both = next((row for row in failing if row.cause == "both wrong"), None)
    if both is not None:
        summary = (
            f"Both are wrong: at {both.name} the errors are {_pair(evidence, both)}, and no correct backend in"
            f" {evidence.dtype} exceeds {both.lid:.2g}; first {where}. Suspect the checkpoint, the oracle, or a"
            " misreading that the two share."
        )
        return Decision("FAIL", summary, "both wrong", "both")
    who, other = _who(evidence, first.blame), _who(evidence, "b" if first.blame == "a" else "a")
    cause = first.cause
    if cause == "rounding" and any(row.cause == "bug" and row.blame == first.blame for row in failing):
        cause = "bug"
    over = f"its error there is {_times(evidence, first, other)}"
    if cause == "rounding":
        summary = f"Rounding-sized, but too much of it, in {who}, first {where}: {over}, yet under the lid of"
        summary += f" {first.lid:.2g}. {_story(evidence)}"
        if evidence.divergence.suspect:
            summary += " Rounding does not step like that: suspect a small bug there."
    elif cause == "bug":
        summary = f"Bug in {who}, first {where}: {over}. {_story(evidence)}"
    else:
        summary = f"The peer, {who}, is the outlier, first {where}: {over}, so {other} is not at fault."
        summary += f" {_story(evidence)}"
    return Decision("FAIL", summary, cause, first.blame)


def _top1(evidence: Evidence) -> Decision | None:
    missed = next((count for count in evidence.top1 if count.first_miss), None)
    if missed is None or missed.first_miss is None:
        return None
    who = _who(evidence, None if missed.side == "both" else missed.side)
    row, position = missed.first_miss
    summary = (
        f"Bug in {who}: every tensor is within its limit, but {missed.decidable - missed.agree} of {missed.decidable}"
        f" decidable tokens have another top-1 than the reference, first at row {row}, position {position}."
    )
    if missed.side == "b":
        return Decision("FAIL", summary, "peer is the outlier", "b")
    return Decision("FAIL", summary, "bug", "a" if missed.side == "a" else None)


def _generated(evidence: Evidence) -> Decision | None:
    found = evidence.generated
    if found is None or found.outcome != "differs" or found.first is None:
        return None
    row, step = found.first
    who = _who(evidence, found.blame) if found.blame else "one of the two (whose is unknown)"
    summary = (
        f"Bug in {who}: the tensors of the prompt agree, but generated tokens differ first at row {row}, step {step},"
        " where the reference is not in doubt. Suspect decoding: cache, positions or sampling."
    )
    return Decision("FAIL", summary, "peer is the outlier" if found.blame == "b" else "bug", found.blame)


def _router(evidence: Evidence) -> Decision | None:
    routing = evidence.routing
    if routing is None or routing.broken is None:
        return None
    who = _who(evidence, routing.broken_side)
    summary = f"Router bug in {who}: {routing.broken}, with nothing flipped before; rounding turns only near ties."
    return Decision("FAIL", summary, "router flip", routing.broken_side)


def _factor(evidence: Evidence) -> Decision | None:
    """A weight off by a factor: far below rounding in every token, and the same in all of them."""
    found = [probe for probe in evidence.probes if probe.cause]
    if not found:
        return None
    first = [probe for probe in found if probe.tensor == found[0].tensor]  # later tensors inherit
    probe = max(first, key=_surety)
    alike = [one.module for one in first if one.blame == probe.blame and _surety(one) > 0.98 * _surety(probe)]
    factor = _factor_of(probe)
    off = f"{100 * abs(factor):.2f} % too {'large' if factor > 0 else 'small'}"
    what = f"{' or '.join(alike)} were {off}" if probe.kind == "scale" else f"{probe.module} had a known fault"
    summary = (
        f"{'Both are wrong' if probe.blame == 'both' else f'Bug in {_who(evidence, probe.blame)}'}: its errors are of"
        f" the size of rounding, yet that of {probe.tensor}{_place(layer_of(probe.tensor))} is as if {what} (give or"
        f" take {100 * (probe.deviation or 0.0):.2f} %). Rounding has no direction."
    )
    return Decision("FAIL", summary, probe.cause, probe.blame)


def _surety(probe: Probe) -> float:
    return abs(_factor_of(probe)) / (probe.deviation or 1e-30)


def _factor_of(probe: Probe) -> float:
    """Of the side at fault."""
    factors = (probe.factor_a or 0.0, probe.factor_b or 0.0)
    return factors[1] if probe.blame == "b" else factors[0]


def _undecided(evidence: Evidence) -> Decision | None:
    reasons: list[str] = []
    cause: Cause | None = None
    routing, generated = evidence.routing, evidence.generated
    if routing and routing.tokens - routing.excluded < MIN_REMAINING * routing.tokens:
        cause = "router flip"
        reasons.append(
            f"router flips leave {routing.tokens - routing.excluded} of {routing.tokens} tokens to judge, fewer than"
            f" {MIN_REMAINING:.0%}: give each backend an oracle with its own routing replayed."
        )
    if generated and generated.outcome == "undecided" and generated.first:
        cause = cause or "tie"
        row, step = generated.first
        reasons.append(
            f"generated tokens differ first at row {row}, step {step}, and nothing recorded says whether that is a tie:"
            " record generated_margins, or compare with these tokens as the prompt."
        )
    blind = blind_blocks(evidence.probes)
    if blind:
        worst = max((probe for probe in evidence.probes if probe.block in blind), key=lambda probe: probe.least)
        reasons.append(
            f"a weight {100 * worst.size:g} % off would not have been seen in {', '.join(blind)} ({worst.module}:"
            f" from {shown(worst.least)}): give more tokens (96 or more), or record in float32."
        )
    if not reasons:
        return None
    return Decision("INCONCLUSIVE", f"Inconclusive: {' '.join(reasons)}", cause, None, tuple(reasons))


def _passed(evidence: Evidence) -> Decision:
    a, b = evidence.labels
    judged = [row for row in evidence.rows if row.verdict == "PASS"]
    if not judged:
        reason = "no token was left to judge."
        return Decision("INCONCLUSIVE", f"Inconclusive: {reason}", reasons=(reason,))
    tightest = min(judged, key=lambda row: row.margin)
    if tightest.basis == "direct":
        summary = (
            f"{a} and {b} agree as far as can be told without an oracle: they are at most {tightest.direct:.2g} apart"
            f" ({tightest.name}, limit {tightest.limit:.2g}). Rounding or a small bug, and whose, is unknown."
        )
    else:
        summary = (
            f"{a} and {b} agree to within rounding ({evidence.dtype}): nearest to its limit is {tightest.name}, with"
            f" errors of {_pair(evidence, tightest)} (limit {tightest.limit:.2g}, lid {tightest.lid:.2g})."
        )
    summary += f" {sensitivity(evidence.probes)}" if evidence.probes else ""
    cause: Cause | None = None
    if evidence.generated and evidence.generated.outcome in ("tie", "router flip"):
        cause = "tie" if evidence.generated.outcome == "tie" else "router flip"
        summary += f" Generated tokens part at a {cause}, which proves nothing."
    return Decision("PASS", summary, cause)


def blind_blocks(probes: tuple[Probe, ...]) -> list[str]:
    """Parts of the model in which no weight that was tried could be wrong and be seen."""
    seen = {probe.block for probe in probes if probe.is_seen}
    return sorted({probe.block for probe in probes} - seen)


def sensitivity(probes: tuple[Probe, ...]) -> str:
    """In one sentence, how small a fault would have been seen."""
    seen = sum(probe.is_seen for probe in probes)
    weakest = max(probes, key=lambda probe: probe.least)
    return (
        f"A weight {100 * weakest.size:g} % off would have been seen in {seen} of {len(probes)} places (weakest:"
        f" {weakest.module}, from {shown(weakest.least)})."
    )


def likeness(found: Likeness) -> str:
    """Which planted bug it looks like, in one sentence."""
    return f"It looks like the planted bug {found.name!r} ({found.says}; similarity {found.similarity:.2f})."


def shown(size: float) -> str:
    """The size of a fault in percent, as short as it can be told."""
    return "no size" if size == float("inf") else f"{100 * size:.2g} %"


def _who(evidence: Evidence, side: Side | None) -> str:
    names = {"a": evidence.labels[0], "b": evidence.labels[1], "both": "both", None: "one of the two"}
    return names[side]


def _pair(evidence: Evidence, row: TensorRow) -> str:
    a, b = evidence.labels
    return f"{row.e_a or 0.0:.2g} ({a}) and {row.e_b or 0.0:.2g} ({b})"


def _times(evidence: Evidence, row: TensorRow, other: str) -> str:
    """How many times the peer's error, of the tensor or, where one token tells more, of that token."""
    limits, token = evidence.limits, row.worst_token
    e_a, e_b, k, what = row.e_a or 0.0, row.e_b or 0.0, limits.k, ""
    if row.by_token and token is not None:
        e_a, e_b, k, what = token.e_a or 0.0, token.e_b or 0.0, limits.k_token, "at that token "
    ratio = max(e_a, e_b) / max(min(e_a, e_b), limits.u)
    return f"{what}{ratio:.3g}x {other}'s (limit {k:g}x)"


def _where(divergence: Divergence) -> str:
    token = f"row {divergence.row}, position {divergence.position}"
    return f"at {divergence.tensor}{_place(divergence.layer)}, worst at {token}"


def _place(layer: int | None) -> str:
    if layer is None:
        return ""
    return " (the embeddings)" if layer == 0 else f" (after decoder layer {layer}, model.layers.{layer - 1})"


def _story(evidence: Evidence) -> str:
    """Local or inherited, in words."""
    found = evidence.divergence
    if found is None:
        return ""
    what = "distance" if found.side is None else "error"
    growth = f"The {what} grows {found.growth:.3g}x in this step against {found.usual_growth:.2g}x in the others"
    if found.suspect == found.tensor:
        return f"{growth}, so it begins here."
    if found.suspect is not None:
        return f"{growth}: it is inherited, and began at {found.suspect}."
    return f"{growth}, so no single step stands out: it builds up."
