"""What is missing of a parameter, or there twice, said by expert and shard: a layer has hundreds of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from loaders.spec import ParamSpec, Source, Specs


def missing_parts(spec: ParamSpec, missing: Sequence[Source], what: str = "missing") -> list[str]:
    """One sentence for every shard that lacks tensors, naming its experts.

    Args:
        spec: the parameter.
        missing: those of its sources that are.
        what: what they are.
    """
    hint = ". Is the checkpoint complete?"
    problems = []
    for sources in _by_shard(missing):
        first, last = sources[0].tensor, sources[-1].tensor
        which = f": {part_of(spec, sources)}" if sources[0].index else ""
        if len(sources) == 1:
            problems.append(f"tensor {first!r} {'is' if what == 'missing' else 'was'} {what}{which}{hint}")
        else:
            verb = "are" if what == "missing" else "were"
            problems.append(f"{len(sources)} tensors {first!r} to {last!r} {verb} {what}{which}{hint}")
    return problems


def repeated_parts(specs: Specs, tensors: Sequence[str]) -> list[str]:
    """One sentence for every shard that two forms of a parameter give, naming its experts.

    Args:
        specs: of the whole model.
        tensors: those among ``specs.rivals`` that are there although the parameter comes in another form.
    """
    by_name = {spec.name: spec for spec in specs}
    found: dict[str, list[Source]] = {}
    for tensor in tensors:
        name, source = specs.rivals[tensor]
        found.setdefault(name, []).append(source)
    problems = []
    for name, sources in found.items():
        ours = by_name[name].sources[0].tensor
        for rivals in _by_shard(sources):
            there = f"tensor {rivals[0].tensor!r} is" if len(rivals) == 1 else f"tensors like {rivals[0].tensor!r} are"
            problems.append(
                f"{there} there beside {ours!r}: {part_of(by_name[name], rivals)} twice. Which one is meant?"
            )
    return problems


def part_of(spec: ParamSpec, sources: Sequence[Source]) -> str:
    """``experts 0 to 3 and 7, shard 1 of 'x.experts.gate_up_proj'``; the shard is that of the first source."""
    ids = [source.expert_id for source in sources if source.expert_id is not None]
    parts = [f"expert{'s' if len(ids) > 1 else ''} {_ranges(ids)}"] if ids else []
    parts += [] if sources[0].shard_id is None else [f"shard {sources[0].shard_id}"]
    return f"{', '.join(parts) or 'all'} of {spec.name!r}"


def _by_shard(sources: Iterable[Source]) -> list[list[Source]]:
    def shard(source: Source) -> int:
        return -1 if source.shard_id is None else source.shard_id

    ordered = sorted(sources, key=lambda source: (shard(source), source.expert_id or 0))
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
