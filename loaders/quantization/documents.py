"""Quantisation documents -> a recipe: which module names are quantised, and how. Whatever is not known is refused.

Sources: nvidia-modelopt 0.47 (``hf_quant_config.json`` and what it writes into config.json) and compressed-tensors 0.20
(``nvfp4-pack-quantized``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from loaders.errors import brief
from loaders.quantization.patterns import Matches, everything, is_exact, numbers_experts, patterns
from loaders.quantization.schemes import BLOCK, Scheme, Spelling
from loaders.regexes import regex_problem

DOCUMENT = "hf_quant_config.json"
KEY = "quantization_config"
# what ModelOpt calls a scheme; everything else is refused by name
ALGORITHMS = {
    "NVFP4": Scheme("nvfp4", activations=True),
    "W4A16_NVFP4": Scheme("nvfp4", activations=False),
    "FP8": Scheme("fp8", activations=True),
}
LINEAR = "Linear"  # the class of every module that compressed-tensors quantises


class Group(NamedTuple):
    """Modules that have one scheme, as a document names them."""

    matches: Matches
    scheme: Scheme
    is_class: bool = False  # they are not named, but of class Linear, which the experts of transformers are not


@dataclass(frozen=True)
class Recipe:
    """What a document says, before it is known which modules there are.

    Attributes:
        spelling: whose document.
        groups: which names have which scheme; the first that matches.
        is_ignored: names that are not quantised, whatever the groups say.
        kv_cache: keys and values are kept in FP8.
        numbers_experts: some name may mean some experts of a layer and not others.
    """

    spelling: Spelling
    groups: tuple[Group, ...]
    is_ignored: Matches
    kv_cache: bool
    numbers_experts: bool

    def group(self, names: Iterable[str]) -> Group | None:
        """Of the module that goes by ``names``; None: it is not quantised."""
        names = tuple(names)
        if self.is_ignored(names):
            return None
        return next((group for group in self.groups if group.matches(names)), None)

    def respelled(self, spelling: Spelling) -> Recipe:
        """The same of tensors that go by other words."""
        groups = [one._replace(scheme=dataclasses.replace(one.scheme, spelling=spelling)) for one in self.groups]
        return dataclasses.replace(self, spelling=spelling, groups=tuple(groups))


def read_recipes(inside: Any, beside: Any) -> tuple[dict[str, Recipe], list[str]]:
    """What each document says, by where it stands, the one that decides on words first; and every problem.

    Args:
        inside: ``quantization_config`` of config.json, or None.
        beside: hf_quant_config.json, or None.
    Returns:
        No recipe for a checkpoint that is not quantised, and none where there are problems.
    """
    found: dict[str, Recipe] = {}
    problems: list[str] = []
    for where, document in ((f"config.json: {KEY}", inside), (DOCUMENT, beside)):
        if document is None:
            continue
        if not isinstance(document, dict):
            problems.append(f"{where} is {brief(document)}, expected an object")
            continue
        groups = inside.get("config_groups") if isinstance(inside, dict) else None
        if document is beside:
            recipe, more = _modelopt(where, document.get("quantization"), groups)
        else:
            recipe, more = _read(where, document)
        problems += more
        if recipe is not None:
            found[where] = recipe
    return ({} if problems else found), problems


def _read(where: str, document: dict[str, Any]) -> tuple[Recipe | None, list[str]]:
    method = document.get("quant_method")
    if method in ("modelopt", "modelopt_fp4", "modelopt_mixed"):  # the latter two are what engines call it
        return _modelopt(where, document.get("quantization", document), document.get("config_groups"))
    if method == "compressed-tensors":
        return _compressed_tensors(where, document)
    known = "'modelopt' and 'compressed-tensors'"
    return None, [f"{where}: quant_method {brief(method)} is not implemented. Known: {known}"]


def _modelopt(where: str, document: Any, groups: Any) -> tuple[Recipe | None, list[str]]:
    if not isinstance(document, dict):
        return None, [f"{where}: quantization is {brief(document)}, expected an object"]
    algorithm = document.get("quant_algo")
    excluded, problems = _names(where, document, "exclude_modules", "ignore")
    kv_cache, more = _kv_cache(where, document)
    problems += more
    named: dict[str, Scheme] = {}
    if algorithm == "MIXED_PRECISION":  # its table is the whole truth: exporters' config_groups contradict it
        named, more = _layers(where, document.get("quantized_layers"))
        problems += more
        assigned = () if problems else _by_precision(named)
    else:
        if "NVFP4" in str(algorithm):
            problems += _size_problems(where, document, groups)
        scheme, more = _algorithm(where, algorithm)
        problems += more
        if scheme is not None and scheme.weights == "nvfp4" and _is_weight_only(groups):
            scheme = Scheme("nvfp4", activations=False)  # NVFP4 whose groups name no input is W4A16
        assigned = () if scheme is None else (Group(everything, scheme),)
    if problems:
        return None, problems
    numbered = any(map(numbers_experts, (*excluded, *named)))
    return Recipe("modelopt", assigned, patterns(excluded), kv_cache, numbered), []


def _by_precision(named: Mapping[str, Scheme]) -> tuple[Group, ...]:
    """The table of a mixed recipe: of the names that mean a module the longest decides, then one with wildcards."""
    ranks: dict[tuple[bool, int, str], list[str]] = {}
    for name, scheme in named.items():
        length = name.count(".") if is_exact(name) else len(name)
        ranks.setdefault((not is_exact(name), -length, str(scheme)), []).append(name)
    return tuple(Group(patterns(names), named[names[0]]) for _, names in sorted(ranks.items()))


def _size_problems(where: str, document: dict[str, Any], groups: Any) -> list[str]:
    """The number of weights to a block scale is said here or in the groups, or nowhere."""
    found = [("group_size", document.get("group_size"))]
    for name, group in _objects(groups).items():
        found += [(f"{name}: {part}: group_size", one.get("group_size")) for part, one in _objects(group).items()]
    return [f"{where}: {at} is {brief(size)}, expected {BLOCK}" for at, size in found if size not in (BLOCK, None)]


def _is_weight_only(groups: Any) -> bool:
    inputs = [group.get("input_activations") for group in _objects(groups).values()]
    return bool(inputs) and all(one is None for one in inputs)


def _objects(found: Any) -> dict[str, dict[str, Any]]:
    """The members of an object that are objects themselves."""
    return {key: one for key, one in found.items() if isinstance(one, dict)} if isinstance(found, dict) else {}


def _algorithm(where: str, algorithm: Any) -> tuple[Scheme | None, list[str]]:
    if isinstance(algorithm, str) and algorithm in ALGORITHMS:
        return ALGORITHMS[algorithm], []
    known = ", ".join((*ALGORITHMS, "MIXED_PRECISION"))
    return None, [f"{where}: quant_algo {brief(algorithm)} is not implemented. Known: {known}"]


def _layers(where: str, layers: Any) -> tuple[dict[str, Scheme], list[str]]:
    """The explicit table of a mixed recipe: module -> scheme."""
    if not isinstance(layers, dict) or not layers or not all(isinstance(entry, dict) for entry in layers.values()):
        return {}, [f"{where}: quantized_layers is {brief(layers)}, expected a table of modules"]
    named: dict[str, Scheme] = {}
    problems = _pattern_problems(f"{where}: quantized_layers", layers)
    for name, entry in layers.items():
        at = f"{where}: quantized_layers {brief(name)}"
        scheme, more = _algorithm(at, entry.get("quant_algo"))
        problems += more
        if scheme is None:
            continue
        if scheme.weights == "nvfp4" and entry.get("group_size") not in (BLOCK, 0, None):  # 0: the exporter's unknown
            problems.append(f"{at}: group_size is {brief(entry['group_size'])}, expected {BLOCK}")
        named[name] = scheme
    return named, problems


def _kv_cache(where: str, document: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether keys and values have FP8 scales; the key has two spellings, the second with two kinds of value."""
    found = document.get("kv_cache_quant_algo")
    found = document.get("kv_cache_scheme") if found is None else found
    if found is None:
        return False, []
    is_fp8 = found == "FP8"
    if isinstance(found, dict):
        bits, kind, is_dynamic = found.get("num_bits"), found.get("type"), found.get("dynamic")
        is_fp8 = (bits, kind, bool(is_dynamic)) == (8, "float", False)
    if not is_fp8:
        return False, [f"{where}: KV cache scheme {brief(found)} is not implemented, expected FP8 with static scales"]
    return True, []


def _compressed_tensors(where: str, document: dict[str, Any]) -> tuple[Recipe | None, list[str]]:
    ignored, problems = _names(where, document, "ignore")
    groups = document.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return None, [*problems, f"{where}: config_groups is {brief(groups)}, expected a table of groups"]
    if document.get("kv_cache_scheme") is not None:
        scheme = brief(document["kv_cache_scheme"])
        problems.append(f"{where}: kv_cache_scheme {scheme} is not implemented for compressed-tensors")
    for key in ("sparsity_config", "transform_config"):
        found = document.get(key)
        if found and not (isinstance(found, dict) and found.get("format") == "dense"):  # older ones say so of nothing
            problems.append(f"{where}: {key} = {brief(found)} is not implemented")
    if document.get("quantization_status", "compressed") != "compressed":
        status = brief(document["quantization_status"])
        problems.append(f"{where}: quantization_status is {status}, expected 'compressed'")
    schemes: dict[str, Scheme] = {}  # by target
    for name, group in groups.items():
        at = f"{where}: {name}"
        if not isinstance(group, dict):
            problems.append(f"{at} is {brief(group)}, expected an object")
            continue
        targets, more = _names(at, group, "targets")
        activations, more_ = _group(at, group, document.get("format"))
        problems += more + more_
        if not targets and not more:
            problems.append(f"{at}: targets is {brief(group.get('targets'))}, expected a list of names")
        for target in targets:
            schemes[target] = Scheme("nvfp4", activations, "compressed-tensors")
    if problems:
        return None, problems
    # as compressed-tensors does: the last of equal targets; exact names before regular expressions, before the class
    ordered = sorted(schemes, key=lambda target: (target == LINEAR, "re:" in target, target))
    assigned = tuple(
        Group(everything, schemes[target], is_class=True)
        if target == LINEAR
        else Group(patterns([target], is_prefix=False), schemes[target])
        for target in ordered
    )
    numbered = any(map(numbers_experts, (*ignored, *ordered)))
    is_ignored = patterns(ignored, is_prefix=False)
    return Recipe("compressed-tensors", assigned, is_ignored, kv_cache=False, numbers_experts=numbered), []


def _group(where: str, group: dict[str, Any], outer: Any) -> tuple[bool, list[str]]:
    """Whether the inputs of a group are quantised; it must be NVFP4."""
    problems = []
    form = group.get("format") or outer
    if form not in ("nvfp4-pack-quantized", "mixed-precision"):
        problems.append(f"{where}: format {brief(form)} is not implemented, expected 'nvfp4-pack-quantized'")
    weights = {"num_bits": 4, "type": "float", "group_size": BLOCK, "strategy": "tensor_group", "dynamic": False}
    problems += _differences(f"{where}: weights", group.get("weights"), weights | {"symmetric": True})
    inputs = group.get("input_activations")
    if inputs is not None:
        expected = weights | {"symmetric": True, "dynamic": "local"}
        problems += _differences(f"{where}: input_activations", inputs, expected)
    if group.get("output_activations") is not None:
        problems.append(f"{where}: output_activations are not implemented")
    return inputs is not None, problems


def _differences(where: str, found: Any, expected: dict[str, Any]) -> list[str]:
    if not isinstance(found, dict):
        return [f"{where} is {brief(found)}, expected an object"]
    return [
        f"{where}: {key} is {brief(found.get(key))}, expected {value!r}"
        for key, value in expected.items()
        if found.get(key, value) != value
    ]


def _names(where: str, document: dict[str, Any], *keys: str) -> tuple[list[str], list[str]]:
    """A list of names under any of its spellings."""
    for key in keys:
        found = document.get(key)
        if found is None:
            continue
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            return [], [f"{where}: {key} is {brief(found)}, expected a list of names"]
        return found, _pattern_problems(f"{where}: {key}", found)
    return [], []


def _pattern_problems(where: str, names: Iterable[str]) -> list[str]:
    problems = []
    for name in names:
        if name.startswith("re:") and (why := regex_problem(name.removeprefix("re:"))):
            problems.append(f"{where} has {brief(name)}: {why}")
    return problems
