"""Names in lots that are read one after the other, so that memory holds little more than the largest part at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loaders.reading.progress import reported

if TYPE_CHECKING:
    from loaders.reading.plan import LoadPlan


@dataclass
class Unit:
    """Names that have to be read together, and what they share with others that have to be, too."""

    names: set[str]
    keys: set[str]


def lots_of(units: Iterable[Unit], sizes: Mapping[str, int]) -> Iterator[set[str]]:
    """Whole units in file order, as many in a lot as are no larger together than the largest of them.

    Args:
        units: those that share a key count as one.
        sizes: bytes that tensors take, in file order.
    """
    whole = joined(units)
    taken = [sum(sizes[name] for name in unit.names) for unit in whole]
    limit = max(taken, default=0)
    order = {name: place for place, name in enumerate(sizes)}
    first = [min(order[name] for name in unit.names) for unit in whole]
    lot: set[str] = set()
    num_bytes = 0
    for index in sorted(range(len(whole)), key=first.__getitem__):
        if lot and num_bytes + taken[index] > limit:
            yield lot
            lot, num_bytes = set(), 0
        lot |= whole[index].names
        num_bytes += taken[index]
    if lot:
        yield lot


def stream_parameters(plan: LoadPlan, into: Callable[[str], np.ndarray | None]) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors of a plan; of one that is staged, parameter by parameter: those begun are no larger than the largest.

    Args:
        plan: what to read, and within which budget.
        into: as for ``Checkpoint.stream``.
    """
    lots = lots_of_plan(plan) if plan.staged else [plan.tensors]
    stream = plan.checkpoint.stream(plan.host_budget_bytes, lots=lots, into=into)
    yield from reported(stream, sum(plan.sizes().values()), str(plan.checkpoint.source), phase=plan.phase)


def lots_of_plan(plan: LoadPlan) -> Iterator[set[str]]:
    """The tensors of a plan in lots of whole parameters.

    Of tensors that are quantised while they are read, codes and scales come together.
    """
    checkpoint = plan.checkpoint
    units = [Unit({name}, {name}) for name in plan.verified]
    for spec in plan.specs:
        if names := {placement.tensor for placement in spec.placements} & plan.targets.keys():
            units.append(Unit(names, {checkpoint.group_of(name) for name in names}))
    return lots_of(units, plan.sizes())


def joined(units: Iterable[Unit]) -> list[Unit]:
    """The same, those that share a key as one."""
    of_key: dict[str, Unit] = {}
    for unit in units:
        one = Unit(set(unit.names), set(unit.keys))
        for other in {id(of_key[key]): of_key[key] for key in unit.keys if key in of_key}.values():
            one = Unit(one.names | other.names, one.keys | other.keys)
        of_key |= dict.fromkeys(one.keys, one)
    return list({id(unit): unit for unit in of_key.values()}.values())
