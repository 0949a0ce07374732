"""From what was measured to one verdict, one cause and one sentence: rounding or bug, where, and whose?"""

from __future__ import annotations

from dataclasses import dataclass

from parity.comparison.findings import Divergence, Generated, Probe, Routing, TensorRow, Top1
from parity.comparison.outcome import Verdict
from parity.ruler import MIN_REMAINING, Cause, Limits, Side
from parity.wording import TOKEN_LIMIT, joined, number, shown, times, told_share


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything a verdict is made from.

    Attributes:
        after: module whose result was handed in, where that was: only what follows it is judged.
        has_digests: whether both traces say which weights they are of, so that those are known to be equal.
    """

    labels: tuple[str, str]
    limits: Limits
    dtype: str
    rows: tuple[TensorRow, ...]
    divergence: Divergence | None
    top1: tuple[Top1, ...]
    generated: Generated | None
    routing: Routing | None
    probes: tuple[Probe, ...] = ()
    after: str | None = None
    has_digests: bool = True

    def module_of(self, tensor: str) -> str:
        """The module whose result a tensor is."""
        return next((row.module for row in self.rows if row.name == tensor), tensor)


@dataclass(frozen=True, slots=True)
class Decision:
    """A verdict; ``headline`` says whose fault it is and where in one clause, ``detail`` why, in sentences."""

    verdict: Verdict
    headline: str
    detail: str
    cause: Cause | None = None
    whose: Side | None = None
    reasons: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """Both."""
        return f"{self.headline}. {self.detail}"


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
    headline = f"{_is_wrong(evidence, row.blame)} in {row.module}"
    return Decision("FAIL", headline, f"What it hands on has {row.nonfinite}.", "bug", row.blame)


def _tensors(evidence: Evidence) -> Decision | None:
    failing = [row for row in evidence.rows if row.verdict == "FAIL"]
    found = evidence.divergence
    if not failing or found is None:
        return None
    first = failing[0]
    a, b = evidence.labels
    where = f"in {found.suspect_module}" if found.suspect_module else f"by {found.module}"
    worst = f"the worst single token is row {found.row}, position {found.position}"
    whole, token = 1 - first.margin, 1 - first.token_margin
    if first.basis == "direct":
        detail = (
            f"What {first.module} hands on is {number(first.direct)} apart over all tokens, {told_share(whole)} of"
            f" {number(first.limit)}, which is what both can be off by rounding; {worst}, at"
            f" {told_share(token, TOKEN_LIMIT)}. {_story(evidence)}"
            " Pass an oracle to learn whose."
        )
        headline = f"{a} and {b} differ {where}, and whose fault it is is unknown without an oracle"
        return Decision("FAIL", headline, detail, "bug", None)
    both = next((row for row in failing if row.cause == "both wrong"), None)
    if both is not None:
        detail = (
            f"What {both.module} hands on is off by {_pair(evidence, both)}, and no correct backend in"
            f" {evidence.dtype} exceeds {number(both.lid)}; {worst}, in {first.module}. {_common_to_both(evidence)}"
        )
        return Decision("FAIL", f"{a} and {b} are both wrong {where}", detail, "both wrong", "both")
    who, other = _who(evidence, first.blame), _who(evidence, "b" if first.blame == "a" else "a")
    cause = first.cause
    if cause == "rounding" and any(row.cause == "bug" and row.blame == first.blame for row in failing):
        cause = "bug"
    its = "its" if found.suspect == first.name else f"its {first.module}'s"
    error = f"error over all tokens is {told_share(whole)}, and {worst}, at {told_share(token, TOKEN_LIMIT)}"
    if first.by_token:
        place = f"row {found.row}, position {found.position}"
        error = f"error at {place} is {told_share(token, TOKEN_LIMIT)}, the most of any single token"
        error += f" (over all tokens: {told_share(whole)})"
    over = f"There {its} {error}; {other} is within its own limits"
    detail = f"{over}. {_story(evidence)}"
    headline = f"{who} is wrong {where}"
    if cause == "rounding":
        headline = f"{who} is off by more than its rounding {where}"
        size = f"It is rounding-sized, under what no correct backend exceeds ({number(first.lid)})"
        detail = f"{over}. {size}. {_story(evidence)}"
        if found.suspect:
            detail += " Rounding does not step like that: suspect a small bug there."
    return Decision("FAIL", headline, detail, cause, first.blame)


def _top1(evidence: Evidence) -> Decision | None:
    missed = next((count for count in evidence.top1 if count.first_miss), None)
    if missed is None or missed.first_miss is None:
        return None
    who = _who(evidence, None if missed.side == "both" else missed.side)
    row, position = missed.first_miss
    detail = (
        f"Every tensor is within its limit, but {missed.decidable - missed.agree} of {missed.decidable}"
        f" decidable tokens have another top-1 than the reference, first at row {row}, position {position}."
    )
    cause: Cause = "peer is the outlier" if missed.side == "b" else "bug"
    whose: Side | None = None if missed.side == "both" else missed.side
    return Decision("FAIL", f"{who} picks wrong tokens in lm_head", detail, cause, whose)


def _generated(evidence: Evidence) -> Decision | None:
    found = evidence.generated
    if found is None or found.outcome != "differs" or found.first is None:
        return None
    row, step = found.first
    a, b = evidence.labels
    headline = f"{a} and {b} generate different tokens, and whose fault it is is unknown"
    if found.blame:
        headline = f"{_who(evidence, found.blame)} generates wrong tokens"
    detail = (
        f"The tensors of the prompt agree, but generated tokens differ first at row {row}, step {step},"
        " where the reference is not in doubt. Suspect decoding: cache, positions or sampling."
    )
    return Decision("FAIL", headline, detail, "peer is the outlier" if found.blame == "b" else "bug", found.blame)


def _router(evidence: Evidence) -> Decision | None:
    routing = evidence.routing
    if routing is None or routing.broken is None:
        return None
    headline = f"{_who(evidence, routing.broken_side)} chose wrong experts in {routing.broken_module}"
    detail = f"{routing.broken}, with nothing flipped before; rounding turns only near ties."
    return Decision("FAIL", headline, detail, "router flip", routing.broken_side)


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
    what = (
        f"{joined(alike, 'or')} were {off}" if probe.kind == "scale" else f"{probe.module} held the noise tried there"
    )
    module = evidence.module_of(probe.tensor)
    detail = (
        f"The error is of the size of rounding, yet what {module} hands on is as if {what} (give or"
        f" take {100 * (probe.deviation or 0.0):.2f} %). Rounding has no direction."
    )
    return Decision("FAIL", f"{_is_wrong(evidence, probe.blame)} in {module}", detail, probe.cause, probe.blame)


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
            f" from {shown(worst.least)}): give more tokens (96 or more, few of them alike), or record in float32."
        )
    if not reasons:
        return None
    told = " ".join(f"{reason[0].upper()}{reason[1:]}" for reason in reasons)
    return Decision("INCONCLUSIVE", _unknown(evidence), told, cause, None, tuple(reasons))


def _unknown(evidence: Evidence) -> str:
    a, b = evidence.labels
    return f"Inconclusive: this run cannot tell whether {a} and {b} agree"


def _passed(evidence: Evidence) -> Decision:
    a, b = evidence.labels
    judged = [row for row in evidence.rows if row.verdict == "PASS"]
    if not judged:
        reason = "No token was left to judge."
        return Decision("INCONCLUSIVE", _unknown(evidence), reason, reasons=(reason,))
    tightest = max(judged, key=lambda row: row.used)
    token = tightest.worst_token
    detail = f"Nearest to its limit comes {tightest.module}, with {tightest.used:.0%} of it used over all tokens."
    if tightest.by_token and token is not None:
        at = f"at row {token.row}, position {token.position}"
        detail = f"Nearest to its limit comes {tightest.module}, with {tightest.used:.0%} of {TOKEN_LIMIT} used {at}."
    after = f" after {evidence.after}" if evidence.after else ""
    headline = f"{a} and {b} agree{after} to within rounding ({evidence.dtype})"
    if tightest.basis == "direct":
        headline = f"{a} and {b} agree{after} as far as can be told without an oracle"
        detail += " Rounding or a small bug, and whose, is unknown."
    detail += f" {_sensitivity(evidence)}" if evidence.probes else ""
    cause: Cause | None = None
    if evidence.generated and evidence.generated.outcome in ("tie", "router flip"):
        cause = "tie" if evidence.generated.outcome == "tie" else "router flip"
        detail += f" Generated tokens part at a {cause}, which proves nothing."
    return Decision("PASS", headline, detail, cause)


def blind_blocks(probes: tuple[Probe, ...]) -> list[str]:
    """Parts of the model in which no weight that was tried could be wrong and be seen."""
    seen = {probe.block for probe in probes if probe.is_seen}
    return sorted({probe.block for probe in probes} - seen)


def _sensitivity(evidence: Evidence) -> str:
    """In one sentence, how small a fault would have been seen."""
    probes = evidence.probes
    seen = sum(probe.is_seen for probe in probes)
    size, after = max(probe.size for probe in probes), f" after {evidence.after}" if evidence.after else ""
    return (
        f"A weight {100 * size:g} % off{after} would have been seen in {seen} of {len(probes)} places"
        f" ({weakest(probes, has_digests=evidence.has_digests)})."
    )


def weakest(probes: tuple[Probe, ...], *, has_digests: bool) -> str:
    """Where a fault has to be largest to be seen, and which kind no activation shows, for whoever counts places."""
    least = max(probes, key=lambda probe: probe.least)
    told = f"weakest: {least.module}, from {shown(least.least)}"
    absorbed = list(dict.fromkeys(probe.module.rpartition(".")[2] for probe in probes if probe.kind == "noise"))
    if not absorbed:
        return told
    how = "by the weights' digests alone" if has_digests else "not at all, without digests in both traces"
    return f"{told}; scales of {joined(absorbed)}, which a norm takes out again, {how}"


def _common_to_both(evidence: Evidence) -> str:
    if evidence.after is not None:
        return f"Both go on from one value of {evidence.after}: suspect that one first."
    return "Suspect the checkpoint, the oracle, or a misreading that the two share."


def _who(evidence: Evidence, side: Side | None) -> str:
    a, b = evidence.labels
    return {"a": a, "b": b, "both": f"{a} and {b}", None: f"{a} or {b}"}[side]


def _is_wrong(evidence: Evidence, side: Side | None) -> str:
    return f"{_who(evidence, side)} {'are both wrong' if side == 'both' else 'is wrong'}"


def _pair(evidence: Evidence, row: TensorRow) -> str:
    a, b = evidence.labels
    return f"{number(row.e_a or 0.0)} ({a}) and {number(row.e_b or 0.0)} ({b})"


def _story(evidence: Evidence) -> str:
    """Local or inherited, in words."""
    found = evidence.divergence
    if found is None:
        return ""
    what = "distance" if found.side is None else "error"
    growth = f"The {what} grows {times(found.growth)}x in this step and {times(found.usual_growth)}x in the others"
    if found.suspect == found.tensor:
        return f"{growth}, so it begins here."
    if found.suspect_module is not None:
        return f"{growth}: it is inherited, and began in {found.suspect_module}."
    return f"{growth}, so no single step stands out: it builds up."
