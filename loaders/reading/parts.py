"""What is missing of a parameter, or there twice, said by expert and shard: a layer has hundreds of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from loaders.spec import ParamSpec, Placement, Specs


def missing_parts(spec: ParamSpec, missing: Sequence[Placement], what: str = "missing") -> list[str]:
    """One sentence for every shard that lacks tensors, naming its experts.

    Args:
        spec: the parameter.
        missing: those of its placements that are.
        what: what they are.
    """
    hint = ". Is the checkpoint complete?"
    problems = []
    for placements in _by_shard(missing):
        first, last = placements[0].tensor, placements[-1].tensor
        which = f": {part_of(spec, placements)}" if placements[0].index else ""
        if len(placements) == 1:
            problems.append(f"tensor {first!r} {'is' if what == 'missing' else 'was'} {what}{which}{hint}")
        else:
            verb = "are" if what == "missing" else "were"
            problems.append(f"{len(placements)} tensors {first!r} to {last!r} {verb} {what}{which}{hint}")
    return problems


def repeated_parts(specs: Specs, tensors: Sequence[str]) -> list[str]:
    """One sentence for every shard that two forms of a parameter give, naming its experts.

    Args:
        specs: of the whole model.
        tensors: those among ``specs.rivals`` that are there although the parameter comes in another form.
    """
    by_name = {spec.name: spec for spec in specs}
    found: dict[str, list[Placement]] = {}
    for tensor in tensors:
        name, placement = specs.rivals[tensor]
        found.setdefault(name, []).append(placement)
    problems = []
    for name, placements in found.items():
        ours = by_name[name].placements[0].tensor
        for rivals in _by_shard(placements):
            there = f"tensor {rivals[0].tensor!r} is" if len(rivals) == 1 else f"tensors like {rivals[0].tensor!r} are"
            problems.append(
                f"{there} there beside {ours!r}: {part_of(by_name[name], rivals)} twice. Which one is meant?"
            )
    return problems


def part_of(spec: ParamSpec, placements: Sequence[Placement]) -> str:
    """``experts 0 to 3 and 7, shard 1 of 'x.experts.gate_up_proj'``; the shard is that of the first placement."""
    ids = [placement.expert_id for placement in placements if placement.expert_id is not None]
    parts = [f"expert{'s' if len(ids) > 1 else ''} {_ranges(ids)}"] if ids else []
    parts += [] if placements[0].shard_id is None else [f"shard {placements[0].shard_id}"]
    return f"{', '.join(parts) or 'all'} of {spec.name!r}"


def _by_shard(placements: Iterable[Placement]) -> list[list[Placement]]:
    def shard(placement: Placement) -> int:
        return -1 if placement.shard_id is None else placement.shard_id

    ordered = sorted(placements, key=lambda placement: (shard(placement), placement.expert_id or 0))
    return [list(group) for _, group in groupby(ordered, shard)]


def _ranges(ids: Sequence[int]) -> str:
    """``0 to 3, 7``: ascending numbers, runs of them by their ends."""
    runs: list[list[int]] = []
    for one in ids:
        if runs and one == runs[-1][1] + 1:
            runs[-1][1] = one
        else:
            runs.append([one, one])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)
