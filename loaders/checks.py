"""What every family asks of its configuration: one sentence for each problem, none when all is well."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from loaders.errors import brief

MOST_LAYERS, MOST_EXPERTS = 10_000, 1_000_000  # of experts: over all layers; beyond is no model but an attack
MOST = 2**31 - 1  # of anything that is counted: ids, positions and indices are signed integers of 32 bits


def size_problems(config: Any, may_be_less: Collection[str] = ()) -> list[str]:
    """Integers below one, other than ``may_be_less``, or above ``MOST``, and more layers than any model has."""
    found = [
        f"config.json: {name} is {value}, expected at least 1"
        for name, value in vars(config).items()
        if type(value) is int and value < 1 and name not in ("pad_token_id", *may_be_less)
    ]
    found += [
        f"config.json: {name} is {brief(value)}, expected at most {MOST}"
        for name, value in vars(config).items()
        if type(value) is int and value > MOST and name not in ("pad_token_id", "num_hidden_layers", "num_experts")
    ]
    found += token_problems("config.json", "pad_token_id", [] if config.pad_token_id is None else [config.pad_token_id])
    found += token_problems("config.json", "eos_token_id", config.eos_token_id)
    if config.num_hidden_layers > MOST_LAYERS:
        found.append(f"config.json: num_hidden_layers is {config.num_hidden_layers}, expected at most {MOST_LAYERS}")
    return found


def token_problems(file: str, name: str, ids: Iterable[object]) -> list[str]:
    """Ids that are no integers, or so large that no token is called so."""
    return [
        f"{file}: {name} is {brief(one)}, expected an integer of 32 bits"
        for one in ids
        if type(one) is not int or not -(2**31) <= one < 2**31
    ]


def multiple_problems(**sizes: int) -> list[str]:
    """Two numbers of heads, many and few, that do not divide into groups; by the names config.json has for them."""
    (many, num_many), (few, num_few) = sizes.items()
    return [f"config.json: {many}={num_many} is not a multiple of {few}={num_few}"] if num_many % num_few else []


def positive_problems(**values: float | None) -> list[str]:
    """Numbers, by their names in config.json, that must be above zero; None is fine."""
    return [
        f"config.json: {name} is {value}, expected more than 0"
        for name, value in values.items()
        if value is not None and not value > 0
    ]


def only_problems(name: str, found: Any, value: str) -> list[str]:
    """An option of which one value is implemented."""
    return [] if found == value else [f"config.json: {name} {brief(found)} is not implemented, expected {value!r}"]


def layer_type_problems(config: Any, *known: str) -> list[str]:
    """Another number of entries than layers, or a kind of layer that is not implemented."""
    found = []
    if len(config.layer_types) != config.num_hidden_layers:
        entries = f"{len(config.layer_types)} entries, expected num_hidden_layers={config.num_hidden_layers}"
        found.append(f"config.json: layer_types has {entries}")
    unknown = sorted(set(config.layer_types) - set(known))
    if unknown:
        kinds = f"layer_types {brief(unknown)} are not implemented. Known: {', '.join(known)}"
        found.append(f"config.json: {kinds}")
    return found


def expert_problems(config: Any) -> list[str]:
    """More experts than any model has, or more of them chosen than there are."""
    found = []
    if config.num_hidden_layers * config.num_experts > MOST_EXPERTS:
        limit = f"at most {MOST_EXPERTS} in all layers together"
        found.append(f"config.json: num_experts is {config.num_experts}, expected {limit}")
    if config.num_experts_per_tok > config.num_experts:
        chosen = f"num_experts_per_tok={config.num_experts_per_tok} of num_experts={config.num_experts}"
        found.append(f"config.json: {chosen} cannot be chosen")
    return found
