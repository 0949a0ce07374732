"""Router flips: where two correct runs chose different experts, and from where on they cannot be compared.

A flip is not an error: near ties in the router fall either way under rounding (0.5 to 9 % of layer-tokens in bf16).
After one, the token's stream is another, and so is every later token that attends to it. Those tokens are taken out of
the ruler, unless the oracle replayed the routing. What replay would hide, a router that is simply wrong, is caught
here: where nothing upstream flipped, only few of the chosen experts may differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parity import trace_layout
from parity.comparison.case import Case, for_tensor
from parity.comparison.findings import Routing
from parity.ruler import ROUTER_SHARE, ROUTER_TOKENS, Side
from parity.trace import Trace


@dataclass(frozen=True)
class Flips:
    """Where the experts of two traces differ: by sparse layer, bool [B, T] and the share of experts not in common."""

    sets: dict[int, np.ndarray]
    shares: dict[int, np.ndarray]

    def excluded(self, layer: int | None) -> np.ndarray:
        """Booleans [B, T]: tokens at or after a flip of their row in this or an earlier layer; None: in any layer."""
        out = np.zeros((), bool)
        for i, flips in self.sets.items():
            if layer is None or i <= layer:
                out = out | np.logical_or.accumulate(flips, axis=1)
        return out


def find_flips(one: Trace, other: Trace, mask: np.ndarray) -> Flips | None:
    """Flips between two traces at unpadded positions; None when they share no routing."""
    layers = [i for i in trace_layout.routing_layers(one.tensors) if f"routing.{i}" in other.tensors]
    if not layers:
        return None
    sets, shares = {}, {}
    for i in layers:
        experts = [trace.tensors[f"routing.{i}"] for trace in (one, other)]
        if experts[0].shape[2] == 0:
            continue
        is_same = experts[0][..., :, None] == experts[1][..., None, :]
        common = np.minimum(is_same.any(axis=3).mean(axis=2), is_same.any(axis=2).mean(axis=2))  # one may repeat itself
        shares[i] = np.where(mask, 1 - common, 0.0)
        sets[i] = shares[i] > 0
    return Flips(sets, shares)


@dataclass(frozen=True)
class Router:
    """What the flips of a case come to: the report, and the tokens to keep."""

    report: Routing | None
    excluding: tuple[Flips, ...]
    between: Flips | None

    def keep(self, case: Case, name: str) -> np.ndarray:
        """Booleans, as ``case.mask``: unpadded tokens of a tensor that no flip reaches."""
        keep = case.mask()
        layer = trace_layout.layer_of(name)
        for flips in self.excluding:
            keep = keep & ~flips.excluded(layer)
        return for_tensor(name, keep)


def study(case: Case) -> Router:
    """Find the flips of a against its oracle and b against its own, or between the two without an oracle."""
    mask = case.mask()
    between = find_flips(case.a, case.b, mask)
    flips_a = find_flips(case.a, case.oracle_a, mask) if case.oracle_a else None
    flips_b = find_flips(case.b, case.oracle_b, mask) if case.oracle_b else None
    if between is None:
        return Router(None, (), None)
    against = [flips for flips in (flips_a, flips_b) if flips]
    excluding = tuple(against) if against else (between,)
    broken, side, layer = _broken(case, flips_a, flips_b, between, mask)
    router = Router(None, excluding, between)
    report = Routing(
        layer_tokens=int(mask.sum()) * len(between.sets),
        flips_a=_count(flips_a),
        flips_b=_count(flips_b),
        between=_count(between) or 0,
        tokens=int(mask.sum()),
        excluded=int((mask & ~router.keep(case, "logits")).sum()),
        first=_first(excluding),
        broken=broken,
        broken_side=side,
        broken_module=None if layer is None else f"{case.module_of(f'hidden_states.{layer}')}.mlp.gate",
    )
    return Router(report, excluding, between)


def _count(flips: Flips | None) -> int | None:
    return None if flips is None else sum(int(layer.sum()) for layer in flips.sets.values())


def _first(excluding: tuple[Flips, ...]) -> tuple[int, int, int] | None:
    """(layer, row, position) of the first flip in order of execution."""
    places = [(layer, np.argwhere(flips)) for found in excluding for layer, flips in found.sets.items()]
    return min(((layer, int(at[0][0]), int(at[0][1])) for layer, at in places if len(at)), default=None)


def _broken(
    case: Case, flips_a: Flips | None, flips_b: Flips | None, between: Flips, mask: np.ndarray
) -> tuple[str | None, Side | None, int | None]:
    """What is wrong with a router, whose it is, and in which layer: seen against an oracle that ran free, else only
    between the two.
    """
    twice = [_repeating_layer(trace, mask) for trace in (case.a, case.b)]
    if any(twice):
        side: Side | None = "both" if all(twice) else "a" if twice[0] else "b"
        who = " and ".join(label for label, layer in zip(case.labels, twice, strict=True) if layer)
        layer = min(filter(None, twice))
        return f"{who} gave tokens one expert twice in {case.module_of(f'hidden_states.{layer}')}", side, layer
    pairs = {f"{case.labels[0]} and its oracle": flips_a, f"{case.labels[1]} and its oracle": flips_b}
    pairs["the two backends"] = between
    found = [_wrong_layer(flips, mask) if flips else None for flips in pairs.values()]
    for who, wrong in zip(pairs, found, strict=True):
        if wrong:
            layer, share = wrong
            side = "both" if found[0] and found[1] else "a" if found[0] else "b" if found[1] else None
            where = case.module_of(f"hidden_states.{layer}")
            return f"{who} differ in {share:.0%} of the experts chosen in {where}", side, layer
    return None, None, None


def _repeating_layer(trace: Trace, mask: np.ndarray) -> int | None:
    """The first sparse layer in which a real token has an expert twice."""
    for i in trace_layout.routing_layers(trace.tensors):
        experts = np.sort(trace.tensors[f"routing.{i}"][mask], axis=-1)
        if (experts[:, 1:] == experts[:, :-1]).any():
            return i
    return None


def _wrong_layer(flips: Flips, mask: np.ndarray) -> tuple[int, float] | None:
    """The first sparse layer that differs by itself, behind no earlier flip, in more than near ties explain."""
    for i, shares in flips.shares.items():
        fresh = mask & ~flips.excluded(i - 1)
        if fresh.sum() >= ROUTER_TOKENS and shares[fresh].mean() > ROUTER_SHARE:
            return i, float(shares[fresh].mean())
    return None
