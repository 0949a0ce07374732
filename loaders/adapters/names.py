"""Names in adapter_config.json that the model cannot answer, and why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from loaders.adapters.config import AdapterConfig, is_called, is_in_module
from loaders.adapters.sites import Sites

Spell = Callable[[str], str]  # a name of ours, as the adapter's model has it
_SINGLE = frozenset({"gate_proj", "up_proj", "down_proj"})  # of experts, before transformers fused them


def name_problems(config: AdapterConfig, sites: Sites, spell: Spell, present: Collection[str]) -> list[str]:
    """Names that no module or parameter has; ``present``: what the adapter has tensors of, whatever that is."""
    modules = {spell(path) for path in sites.low_rank} | {spell(tensor).rpartition(".")[0] for tensor in sites.whole}
    modules |= set(present)
    has_experts = any(site.kind == "experts" for site in sites.low_rank.values())
    parameters = {
        spell(path if site.kind == "experts" else f"{path}.weight") for path, site in sites.low_rank.items()
    } | {f"{path}.weight" for path in present}
    problems = []
    for name in () if isinstance(config.target_modules, str) else config.target_modules:
        if (has_experts and name in _SINGLE) or any(is_called(module, name) for module in modules):
            continue
        of_tower = [module for module in sites.tower_modules if is_called(module, name)]
        if not of_tower:
            problems.append(f"adapter_config.json: target_modules names {name!r}, which no module is called")
        elif any(config.targets(module) for module in of_tower):  # what exclude_modules names PEFT leaves alone
            problems.append(
                f"adapter_config.json: target_modules names {name!r}, which only modules of {sites.tower!r} are called:"
                " adapters of the vision tower are not implemented"
            )
    for name in config.target_parameters:
        if not any(is_called(parameter, name) for parameter in parameters):
            problems.append(
                f"adapter_config.json: target_parameters names {name!r}, which no parameter is called that can be"
                " adapted: weights of linear layers, routers, embedding and head, and stacks of experts"
            )
    known = {*map(spell, sites.whole), *map(spell, sites.low_rank), *(f"{path}.weight" for path in present)}
    for name in config.modules_to_save:
        if not any(is_in_module(tensor, name) for tensor in known):
            problems.append(
                f"adapter_config.json: modules_to_save names {name!r}, which is no module that can be replaced"
            )
    return problems


def whole_problems(config: AdapterConfig, sites: Sites, spell: Spell, paths: Collection[str]) -> list[str]:
    """Modules that are to be replaced and hold what cannot be; ``paths``: the tensors of such that the adapter has."""
    stacks = [path for path, site in sites.low_rank.items() if site.kind == "experts"]
    problems = []
    for name in config.modules_to_save:
        held = [path for path in stacks if is_in_module(spell(path), name)]
        others = sorted(path for path in paths if is_in_module(spell(path), name))
        if held:
            problems.append(
                f"adapter_config.json: modules_to_save names {name!r}, which holds experts ({_some(held)}): whole"
                " experts of an adapter are not implemented. Adapt them by target_parameters."
            )
        elif others:
            problems.append(
                f"adapter_config.json: modules_to_save names {name!r}, which holds {_some(others)}: such tensors of an"
                " adapter are not implemented. Name the modules below it that can be replaced."
            )
    return problems


def tower_problem(tower: str, modules: Sequence[str]) -> list[str]:
    """One sentence about all modules of the vision tower that an adapter has tensors of."""
    if not modules:
        return []
    found = sorted(set(modules))
    return [
        f"adapters of the vision tower are not implemented: it has tensors of {len(found)}"
        f" module{'s' if len(found) > 1 else ''} of {tower!r} ({_some(found)}). PEFT matches names by their ends: name"
        " the language model's in full, or by a pattern"
    ]


def _some(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
