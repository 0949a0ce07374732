"""What quantisation makes of a family's rules: which modules there are to quantise, and the tensors each then has."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from loaders.quantization import BLOCK, Quantization, Scheme, kv_leaf
from loaders.quantization_config import Recipe
from loaders.spec import ModelConfig, Rule, dim_of

EXPERTS = ".experts"
# stacked experts -> how the field names the stacks of a quantised one
STACKS = {"gate_up_proj": "w13", "down_proj": "w2"}
# paths of the text model in the names that exporters write, besides those that its tensors have
TEXT_PATHS = ("model", "model.language_model", "language_model.model", "language_model")


def module_of(rule: Rule, text: str, layer: int) -> str:
    """Path of the module that a matrix belongs to: of the linear layer, or of all the experts of a layer."""
    parameter = rule.parameter.format(text=text, layer=layer)
    before, found, _ = parameter.rpartition(f"{EXPERTS}.")
    return before + EXPERTS if found else parameter.rpartition(".")[0]


def stored_as(rule: Rule, scheme: Scheme | None, quantization: Quantization | None) -> list[Rule]:
    """The rules that take the place of one: itself, or those of the tensors of a quantised matrix."""
    found = [rule]
    if scheme is not None and rule.is_linear:
        found = [_part(rule, *part) for part in scheme.parts(rule.dims)]
    elif scheme is not None and rule.is_fused:
        found = []  # exporters quantise experts one by one
    leaf = kv_leaf(rule.tensor) if quantization is not None and quantization.kv_cache and rule.on == "layer" else None
    if leaf is not None:
        found.append(_part(rule, leaf, "", "F32"))
    return found


def _part(rule: Rule, leaf: str, dims: str, dtype: str) -> Rule:
    tensor = f"{rule.tensor.removesuffix('.weight')}.{leaf}"
    into = None
    if rule.into is not None:
        module, _, stack = rule.into.rpartition(".")
        into = f"{module}.{STACKS[stack]}_{leaf}"
    return dataclasses.replace(rule, tensor=tensor, dims=dims, into=into, dtype=dtype)


def resolve(
    recipe: Recipe, rules: Sequence[Rule], config: ModelConfig, found: Collection[str]
) -> tuple[Quantization, list[str]]:
    """What a recipe means for the modules of a model, and every problem with it.

    A module of the draft or of the vision tower whose tensors are not quantised is not, whatever the recipe says:
    exporters leave ``mtp.*`` and ``visual.*`` alone and forget to say so.

    Args:
        recipe: the documents.
        rules: the family's table.
        config: without quantisation.
        found: tensors of the checkpoint.
    """
    text, dims = config.text_paths[0], config.dims()
    table: dict[str, Scheme | None] = {}
    problems: list[str] = []
    for rule in rules:
        if not rule.is_linear or (rule.tied_to is not None and config.tie_word_embeddings):
            continue
        for layer in range(rule.count(config) if "{layer}" in rule.tensor else 1):
            if not rule.when(config, layer) or (rule.is_visual and config.vision is None):
                continue
            names = _names(rule, config, layer)
            scheme = recipe.scheme(names)
            is_apart = (rule.on == "mtp" and found) or rule.is_visual
            if is_apart and scheme is not None and not _is_there(names[0], scheme, found):
                scheme = None
            module = module_of(rule, text, layer)
            if table.setdefault(module, scheme) != scheme:
                both = f"{table[module] or 'not quantised'} and {scheme or 'not quantised'}"
                problems.append(f"quantisation: projections of {module} are {both}. One scheme for all is implemented.")
            if scheme is not None and scheme.weights == "fp8" and module.endswith(EXPERTS):
                problems.append(f"quantisation: {names[0]} is {scheme}, which is not implemented for experts")
            inner = dim_of(rule.dims.split()[1], dims)
            if scheme is not None and scheme.weights == "nvfp4" and inner.size % BLOCK:
                inputs = f"{inner.size} inputs ({inner.origin}), expected a multiple of {BLOCK}"
                problems.append(f"quantisation: {names[0]} has {inputs}")
    schemes = {path: scheme for path, scheme in table.items() if scheme is not None}
    return Quantization.of(schemes, kv_cache=recipe.kv_cache, spelling=recipe.spelling), problems


def _names(rule: Rule, config: ModelConfig, layer: int) -> list[str]:
    """What exporters may call the module of a matrix; of the experts, the first and the fused one."""
    paths = dict.fromkeys((*config.text_paths, *TEXT_PATHS)) if "{text}" in rule.tensor else [""]
    tensor = rule.tensor.removesuffix(".weight")
    spelled = [tensor, tensor.replace("{expert}.", "")] if "{expert}" in tensor else [tensor]
    return [one.format(text=path, layer=layer, expert=0) for path in paths for one in spelled]


def _is_there(module: str, scheme: Scheme, found: Collection[str]) -> bool:
    return f"{module}.{scheme.leaves['global']}" in found
