"""``tandem mutate``: plant bugs on purpose and count how many are caught."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from parity.commands.options import output_file

if TYPE_CHECKING:
    from parity.mutants import MutantResult

KINDS = ("attention", "moe", "head", "loader", "reload", "hybrid", "gemma", "draft", "graphs", "lora", "vision")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", metavar="NAME", action="append", help="this mutant only; may be given again")
    parser.add_argument("--kind", choices=KINDS, help="mutants of one part only")
    parser.add_argument(
        "--profiles",
        metavar="FILE",
        type=output_file,
        help="write what a comparison sees of each, to know them again; minutes",
    )
    parser.add_argument("--list", action="store_true", help="list the mutants and what they are; try none")


def run(args: argparse.Namespace) -> int:
    from parity import mutants

    if unknown := sorted(set(args.only or ()) - mutants.all_mutants().keys()):
        raise ValueError(f"no mutant is called {', '.join(unknown)}; `tandem mutate --list` says which there are")
    if args.list:
        for mutant in mutants.all_mutants().values():
            if args.kind in (None, mutant.kind) and mutant.name in (args.only or [mutant.name]):
                print(f"{mutant.name:34} {mutant.kind:10} {mutant.source:12} {mutant.says}")
        return 0
    if args.profiles:
        return _write_profiles(args)
    results = mutants.score(args.only, kind=args.kind)
    print(render(results))
    return 0 if results and all(result.is_as_expected for result in results) else 1


def _write_profiles(args: argparse.Namespace) -> int:
    from parity.mutants.profiles import make_library, profiled, write_library

    chosen = [m for m in profiled() if args.kind in (None, m.kind) and (not args.only or m.name in args.only)]
    document = make_library(chosen)
    write_library(args.profiles, document)
    print(f"wrote {args.profiles}: profiles of {len(document['mutants'])} mutants")
    return 0 if document["mutants"] else 1


def render(results: list[MutantResult]) -> str:
    """The table and, under it, the score."""
    lines = [f"{'mutant':34} {'kind':10} {'backend':8} {'outcome':11} {'s':>5}  evidence"]
    for result in results:
        mutant = result.mutant
        lines.append(
            f"{mutant.name:34} {mutant.kind:10} {result.backend:8} {_outcome(result):11} {result.seconds:5.2f}"
            f"  {result.evidence or mutant.equivalent or mutant.says}"
        )
    counted = [result for result in results if result.mutant.equivalent is None and not result.is_broken]
    killed = sum(result.killed for result in counted)
    share = f" ({killed / len(counted):.0%})" if counted else ""
    broken = sum(result.is_broken for result in results)
    lines.append(
        f"mutation score: {killed} of {len(counted)} killed{share};"
        f" {len(results) - len(counted) - broken} equivalent, not counted"
        f"{f'; {broken} could not be tried' if broken else ''}"
    )
    return "\n".join(lines)


def _outcome(result: MutantResult) -> str:
    if result.is_broken:
        return "NOT TRIED"
    if result.mutant.equivalent is not None:
        return "not equal!" if result.killed else "equivalent"
    return "killed" if result.killed else "SURVIVED"
