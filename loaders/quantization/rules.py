"""What quantisation makes of a family's rules: which modules there are to quantise, and the tensors each then has."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

from loaders.quantization.documents import Recipe
from loaders.quantization.schemes import BLOCK, KV_LEAVES, KVCache, Quantization, Scheme, kv_leaf
from loaders.spec import Dim, ModelConfig, Rule, dim_of

EXPERTS = ".experts"
# stacked experts -> how the field names the stacks of a quantised one
STACKS = {"gate_up_proj": "w13", "down_proj": "w2"}
# paths of the text model in the names that exporters write, besides those that its tensors have
TEXT_PATHS = ("model", "model.language_model", "language_model.model", "language_model", "")

Stored = dict[str, set[str]]  # of the experts of a layer: ``0.up_proj``, or a fused tensor -> its leaves


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
    has_scales = quantization is not None and quantization.kv_cache == "scaled" and rule.on == "layer"
    leaf = kv_leaf(rule.tensor) if has_scales else None
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


def spelled_path(config: ModelConfig, found: Collection[str]) -> str:
    """Path of the text model in the names of the tensors ``found``."""
    others = (path for path in config.text_paths[1:] if any(name.startswith(f"{path}.") for name in found))
    return next(others, config.text_paths[0])


def agreed(
    recipes: Mapping[str, Recipe], rules: Sequence[Rule], config: ModelConfig, found: Collection[str]
) -> tuple[Quantization, list[str]]:
    """What all the documents of a checkpoint mean: they may differ in words, not in what becomes of a module.

    Args:
        recipes: by where they stand; tensors go by the words of the first.
        rules: see ``resolve``, as the others.
        config: see there.
        found: see there.
    """
    (here, first), *others = recipes.items()
    meant, problems = resolve(first, rules, config, found)
    for there, other in others:
        also, more = resolve(other.respelled(first.spelling), rules, config, found)
        problems += [problem for problem in more if problem not in problems]
        ways = also.differences(meant)
        rest = f" (and {len(ways) - 1} more)" if len(ways) > 1 else ""
        problems += [f"{there}: {way} by {here}{rest}. Which one is meant?" for way in ways[:1]]
    return meant, problems


def resolve(
    recipe: Recipe, rules: Sequence[Rule], config: ModelConfig, found: Collection[str]
) -> tuple[Quantization, list[str]]:
    """What a recipe means for the modules of a model, and every problem with it.

    The tensors decide where documents are known to say too much. A module of the draft or of the vision tower that is
    stored plain is plain: exporters leave ``mtp.*`` and ``visual.*`` alone and forget to say so. So are experts that
    are stored plain and that compressed-tensors means by their class: those of transformers are no Linears. An FP8
    cache none of whose scales is there is cast: ModelOpt writes none then.

    Args:
        recipe: the document.
        rules: the family's table.
        config: without quantisation.
        found: tensors of the checkpoint.
    """
    text, spelled, dims = config.text_paths[0], spelled_path(config, found), config.dims()
    stored = _experts_of(found)
    table: dict[str, Scheme | None] = {}
    problems: dict[str, None] = {}  # each once
    for rule, layer in _matrices(rules, config):
        module, experts = module_of(rule, text, layer), stored.get(module_of(rule, spelled, layer), {})
        for names in _names(rule, config, layer, every=recipe.numbers_experts):
            scheme = _scheme(recipe, rule, names, experts, found)
            if rule.tied_to is not None and config.tie_word_embeddings:
                problems |= dict.fromkeys(_tied_problems(names[0], scheme, found))
                continue
            if table.setdefault(module, scheme) != scheme:
                problems[_split(module, table[module], scheme)] = None
        problems |= dict.fromkeys(_problems(rule, module, table.get(module), dims, experts))
    schemes = {path: scheme for path, scheme in table.items() if scheme is not None}
    kv_cache = _kv_cache(rules, found) if recipe.kv_cache else None
    return Quantization.of(schemes, kv_cache=kv_cache, spelling=recipe.spelling), list(problems)


def _matrices(rules: Sequence[Rule], config: ModelConfig) -> Iterator[tuple[Rule, int]]:
    """Every rule of a matrix that could be quantised, for each layer that it holds of."""
    for rule in rules:
        if rule.is_linear and not (rule.is_visual and config.vision is None):
            layers = range(rule.count(config) if "{layer}" in rule.tensor else 1)
            yield from ((rule, layer) for layer in layers if rule.when(config, layer))


def _names(rule: Rule, config: ModelConfig, layer: int, *, every: bool) -> Iterator[list[str]]:
    """What exporters may call the module of a matrix, and with ``every`` that of each expert; else the first speaks."""
    paths = dict.fromkeys((*config.text_paths, *TEXT_PATHS)) if "{text}" in rule.tensor else [""]
    tensor = rule.tensor.removesuffix(".weight")
    spelled = [tensor, tensor.replace("{expert}.", "")] if "{expert}" in tensor else [tensor]
    for expert in range(config.dims()["E"].size if every and "{expert}" in tensor else 1):
        named = [one.format(text=path, layer=layer, expert=expert) for path in paths for one in spelled]
        yield [name.removeprefix(".") for name in named]


def _scheme(recipe: Recipe, rule: Rule, names: Sequence[str], experts: Stored, found: Collection[str]) -> Scheme | None:
    group = recipe.group(names)
    if group is None:
        return None
    is_apart = rule.is_visual or rule.on == "mtp"
    if is_apart and f"{names[0]}.{group.scheme.leaves['global']}" not in found:
        return None
    is_plain = bool(experts) and not any(_is_quantized(leaves, group.scheme) for leaves in experts.values())
    return None if group.is_class and is_plain else group.scheme


def _experts_of(found: Collection[str]) -> dict[str, Stored]:
    """What files have of experts, by the path of all the experts of a layer."""
    stored: dict[str, Stored] = {}
    for name in found:
        before, experts, inner = name.partition(f"{EXPERTS}.")
        if experts:
            projection, _, leaf = inner.rpartition(".")
            stored.setdefault(before + EXPERTS, {}).setdefault(projection or leaf, set()).add(leaf)
    return stored


def _is_quantized(leaves: set[str], scheme: Scheme) -> bool:
    return not leaves.isdisjoint({*scheme.leaves.values()} - {"weight"})  # plain ones have that, too


def _kv_cache(rules: Sequence[Rule], found: Collection[str]) -> KVCache:
    """How the layers keep keys and values; a draft's have no say."""
    apart = tuple(rule.tensor.partition("{")[0] for rule in rules if rule.on == "mtp")
    # else it is a configuration without weights, or a stage without attention
    has_keys = any(".k_proj." in name and not name.startswith(apart) for name in found)
    return "cast" if has_keys and not any(name.endswith(KV_LEAVES) for name in found) else "scaled"


def _problems(rule: Rule, module: str, scheme: Scheme | None, dims: dict[str, Dim], experts: Stored) -> list[str]:
    if scheme is None:
        return []
    problems = []
    if scheme.weights == "fp8" and module.endswith(EXPERTS):
        problems.append(f"quantisation: {module} is {scheme}, which is not implemented for experts")
    plain = [projection for projection, leaves in experts.items() if not _is_quantized(leaves, scheme)]
    if plain and len(plain) < len(experts):
        problems.append(_split(module, scheme, None, f", as stored ({plain[0]})"))
    inner = dim_of(rule.dims.split()[1], dims)
    if scheme.weights == "nvfp4" and inner.size % BLOCK:
        inputs = f"{inner.size} inputs ({inner.origin}), expected a multiple of {BLOCK}"
        leaf = rule.tensor.removesuffix(".weight").rpartition(".")[2]
        problems.append(f"quantisation: {module}{'.' + leaf if module.endswith(EXPERTS) else ''} has {inputs}")
    return problems


def _split(module: str, one: Scheme | None, other: Scheme | None, where: str = "") -> str:
    both = f"{one or 'not quantised'} and {other or 'not quantised'}{where}"
    return f"quantisation: projections of {module} are {both}. One scheme for all is implemented."


def _tied_problems(module: str, scheme: Scheme | None, found: Collection[str]) -> list[str]:
    if scheme is None or not any(f"{module}.{leaf}" in found for leaf in scheme.leaves.values() if leaf != "weight"):
        return []
    tied = "tie_word_embeddings is true, so the embedding is used for it"
    return [f"quantisation: {module} is {scheme}, but {tied}. Set it to false if {module} is meant."]
