"""A family's table of rules, for one configuration and pipeline stage: one ``ParamSpec`` per parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from loaders.quantization.rules import module_of, spelled_path, stored_as
from loaders.quantization.schemes import Scheme
from loaders.spec import Dim, ModelConfig, ParamSpec, Placement, Rule, Specs, TiedSpec, shape_of
from loaders.stage import Stage


class Shaped(Protocol):
    """What must be known of a checkpoint's tensor to tell its form."""

    @property
    def shape(self) -> tuple[int, ...]: ...


NOTHING: Mapping[str, Shaped] = MappingProxyType({})
Candidate = list[tuple[Rule, Placement]]


def expand(
    rules: Sequence[Rule],
    config: ModelConfig,
    stage: Stage | None = None,
    found: Mapping[str, Shaped] = NOTHING,
    forms: Sequence[str] = (),
) -> Specs:
    """The parameters of ``stage`` (default: the whole model), in the table's order, layer by layer.

    Args:
        rules: a family's table.
        config: the configuration.
        stage: which part of the model.
        found: tensors of a checkpoint: they decide how placements are spelled and which form a parameter comes in, by
            name and by shape. The parameters themselves never depend on it.
        forms: forms to take where ``found`` does not decide, best first; else the table's first.
    """
    stage = stage or Stage()
    dims = config.dims()
    text = config.text_paths[0]
    spelled = spelled_path(config, found)
    by_form: dict[str, dict[str, Candidate]] = {}
    tied: list[TiedSpec] = []
    rule_of: dict[str, Rule] = {}
    quantized = {} if config.quantization is None else config.quantization.table
    schemes: dict[str, Scheme] = {}
    for rule, layer in _lines(rules, config, stage):
        if rule.tied_to is not None and config.tie_word_embeddings:
            tensor = rule.tensor.format(text=spelled)
            rule_of[tensor] = rule
            tied.append(TiedSpec(tensor, rule.tied_to.format(text=text), shape_of(rule.dims, dims)))
            continue
        module = module_of(rule, text, layer)
        if module in quantized:
            schemes[module] = quantized[module]
        for part in stored_as(rule, quantized.get(module), config.quantization):
            placements = by_form.setdefault(part.parameter.format(text=text, layer=layer), {}).setdefault(part.form, [])
            experts = range(dims["E"].size) if "{expert}" in part.tensor else [None]
            for expert in experts:
                tensor = part.tensor.format(text=spelled, layer=layer, expert=expert)
                placements.append((part, Placement(tensor, expert, part.shard_id)))
    params: list[ParamSpec] = []
    rivals: dict[str, tuple[str, Placement]] = {}
    ends: dict[str, str] = {}
    for name, chosen in _chosen(by_form, found, forms, dims).items():
        params.append(_param(name, [placement for _, placement in chosen], chosen[0][0], dims))
        rule_of |= {placement.tensor: rule for rule, placement in chosen}
        others = (placement for one in by_form[name].values() for _, placement in one if one is not chosen)
        rivals |= {placement.tensor: (name, placement) for placement in others}
        ends.setdefault(chosen[0][0].on, name)
    embedding = ends.get("embedding")
    head = embedding if config.tie_word_embeddings else ends.get("head")
    origins = {letter: dim.origin for letter, dim in dims.items()}
    rivals = {tensor: place for tensor, place in rivals.items() if tensor not in rule_of}
    return Specs(tuple(params), tuple(tied), embedding, head, origins, rule_of, schemes, rivals)


def _lines(rules: Sequence[Rule], config: ModelConfig, stage: Stage) -> Iterator[tuple[Rule, int]]:
    """Every rule that holds on this stage, for each layer that it holds of."""
    for rule in rules:
        if _on_stage(rule, config, stage):
            yield from ((rule, layer) for layer in _layers(rule, config, stage) if rule.when(config, layer))


def _layers(rule: Rule, config: ModelConfig, stage: Stage) -> Sequence[int]:
    if "{layer}" not in rule.tensor:
        return [0]
    return stage.layers(rule.count(config)) if rule.on == "layer" else range(rule.count(config))


def _chosen(
    by_form: dict[str, dict[str, Candidate]],
    found: Mapping[str, Shaped],
    forms: Sequence[str],
    dims: dict[str, Dim],
) -> dict[str, Candidate]:
    """Of every parameter the form that the checkpoint has something of; the others' tensors are then unexpected.

    Where names fit several forms, shapes decide for all parameters of the module at once: a matrix that fits both ways
    follows its sibling. What shapes leave open goes to the form that comes first in the table.
    """
    chosen: dict[str, Candidate] = {}
    open_: dict[str, dict[str, dict[str, Candidate]]] = {}  # module -> parameter -> forms
    for name, candidates in by_form.items():
        there = {form: one for form, one in candidates.items() if any(place.tensor in found for _, place in one)}
        first = next((form for form in forms if form in candidates), next(iter(candidates)))
        there = there or {first: candidates[first]}
        names = next(iter(there.values()))
        chosen[name] = names
        rivals = {form: one for form, one in there.items() if _tensors(one) == _tensors(names)}
        if len(rivals) > 1:
            open_.setdefault(name.rpartition(".")[0], {})[name] = rivals
    for rivals in open_.values():
        fits: dict[str, int] = {}
        for candidates in rivals.values():
            for form, one in candidates.items():
                there = [(rule, found[placement.tensor]) for rule, placement in one if placement.tensor in found]
                fitting = sum(info.shape == shape_of(rule.dims, dims) for rule, info in there)
                fits[form] = fits.get(form, 0) + fitting
        best = max(fits, key=fits.__getitem__)  # the first of several
        chosen |= {name: candidates[best] for name, candidates in rivals.items()}
    return chosen


def _tensors(candidate: Candidate) -> list[str]:
    return [placement.tensor for _, placement in candidate]


def _on_stage(rule: Rule, config: ModelConfig, stage: Stage) -> bool:
    # a tied head reads the embedding, and so does a draft: the last stage holds a copy that every update refreshes
    holds_embedding = stage.holds_embedding(is_tied=config.tie_word_embeddings)
    has_tower = stage.has_tower and config.vision is not None
    return {
        "visual": has_tower,
        "deepstack": has_tower,
        "layer": True,
        "embedding": holds_embedding,
        "head": stage.is_last,
        "last": stage.is_last,
        "mtp": stage.is_last and stage.mtp,
    }[rule.on]


def _param(name: str, placements: list[Placement], rule: Rule, dims: dict[str, Dim]) -> ParamSpec:
    stacks: list[str] = []
    if placements[0].expert_id is not None:
        stacks.append("E")
    if placements[0].shard_id is not None:
        stacks.append(str(1 + max(placement.shard_id or 0 for placement in placements)))
    axes = (*stacks, *(rule.param_dims or rule.dims).split())
    is_transposed = rule.form == "fused transposed"
    shapes = shape_of(" ".join(axes), dims), shape_of(rule.dims, dims)
    return ParamSpec(name, shapes[0], axes, tuple(placements), shapes[1], rule.dtype, is_transposed)
