"""A family's table of rules, for one configuration and pipeline stage: one ``ParamSpec`` per parameter."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from loaders.quantization import Scheme
from loaders.quantized_rules import module_of, stored_as
from loaders.spec import Dim, ModelConfig, ParamSpec, Rule, Source, Specs, TiedSpec, shape_of
from loaders.stage import Stage


def expand(
    rules: Sequence[Rule],
    config: ModelConfig,
    stage: Stage | None = None,
    found: Collection[str] = (),
    forms: Sequence[str] = (),
) -> Specs:
    """The parameters of ``stage`` (default: the whole model), in the table's order, layer by layer.

    Args:
        rules: a family's table.
        config: the configuration.
        stage: which part of the model.
        found: tensors of a checkpoint: they decide how sources are spelled and which form a parameter comes in. The
            parameters themselves never depend on it.
        forms: forms to take where ``found`` does not decide, best first; else the table's first.
    """
    stage = stage or Stage()
    dims = config.dims()
    text = config.text_paths[0]
    spelled = next((path for path in config.text_paths[1:] if any(name.startswith(f"{path}.") for name in found)), text)
    by_form: dict[str, dict[str, list[tuple[Rule, Source]]]] = {}
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
            sources = by_form.setdefault(part.parameter.format(text=text, layer=layer), {}).setdefault(part.form, [])
            experts = range(dims["E"].size) if "{expert}" in part.tensor else [None]
            for expert in experts:
                tensor = part.tensor.format(text=spelled, layer=layer, expert=expert)
                sources.append((part, Source(tensor, expert, part.shard_id)))
    params: list[ParamSpec] = []
    ends: dict[str, str] = {}
    for name, candidates in by_form.items():
        chosen = _chosen(candidates, found, forms)
        params.append(_param(name, [source for _, source in chosen], chosen[0][0], dims))
        rule_of |= {source.tensor: rule for rule, source in chosen}
        ends.setdefault(chosen[0][0].on, name)
    embedding = ends.get("embedding")
    head = embedding if config.tie_word_embeddings else ends.get("head")
    origins = {letter: dim.origin for letter, dim in dims.items()}
    return Specs(tuple(params), tuple(tied), embedding, head, origins, rule_of, schemes)


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
    candidates: dict[str, list[tuple[Rule, Source]]], found: Collection[str], forms: Sequence[str]
) -> list[tuple[Rule, Source]]:
    """The form that the checkpoint has something of; the others' tensors are then unexpected."""
    for sources in candidates.values():
        if any(source.tensor in found for _, source in sources):
            return sources
    return next((candidates[form] for form in forms if form in candidates), next(iter(candidates.values())))


def _on_stage(rule: Rule, config: ModelConfig, stage: Stage) -> bool:
    # a tied head reads the embedding, and so does a draft: the last stage holds a copy that every update refreshes
    holds_embedding = stage.is_first or (stage.is_last and (config.tie_word_embeddings or stage.mtp))
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


def _param(name: str, sources: list[Source], rule: Rule, dims: dict[str, Dim]) -> ParamSpec:
    stacks: list[str] = []
    if sources[0].expert_id is not None:
        stacks.append("E")
    if sources[0].shard_id is not None:
        stacks.append(str(1 + max(source.shard_id or 0 for source in sources)))
    axes = (*stacks, *(rule.param_dims or rule.dims).split())
    return ParamSpec(name, shape_of(" ".join(axes), dims), axes, tuple(sources), shape_of(rule.dims, dims), rule.dtype)
