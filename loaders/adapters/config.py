"""adapter_config.json of a PEFT LoRA adapter, read strictly: what it asks for is done, or refused by name.

Source: peft 0.21 ``LoraConfig``, ``check_target_module_exists``, ``get_pattern_key``; checked against PEFT itself in
tests/loaders/test_adapters.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loaders.errors import brief
from loaders.regexes import regex_problem

ALL_LINEAR = "all-linear"
_DEFAULT = 8  # PEFT's, of r and of lora_alpha
# how it was trained, or by what: nothing to compute. fan_in_fan_out is of layers that store [in, out], which no model
# here has: PEFT switches it off for others
_OF_TRAINING = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "eva_config", "fan_in_fan_out", "inference_mode", "lora_dropout"),
        *("megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
    }
)
_READ = frozenset(
    {
        *("alpha_pattern", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform"),
        *("lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "target_parameters"),
        *("use_rslora", "bias"),
    }
)
# ways to begin that leave the base's weights as they are; others subtract from them
_INITS = (True, False, "gaussian", "eva", "orthogonal")
# of which PEFT asks only whether they are there: an empty one is on, with that kind's defaults
_ON_IF_THERE = re.compile(r"use_\w+|(?!loftq_)\w+_config")
_MOST_RANK, _MOST_ALPHA = 1 << 16, 3.4e38  # a scaling is alpha by a rank or its root: float32 has to hold it
_LAYER = "number_of_the_layer"  # a group of its own name: what it is put behind may have groups too
_FIRST_LAYER = re.compile(rf".*?\.[^.]*\.(?P<{_LAYER}>\d+)\.")  # the first number of a module path, not an expert's


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which modules an adapter changes, at which rank, and by how much. Fields are adapter_config.json keys.

    Names are module paths as the adapter's own model spells them. A pattern is a regular expression that a path must
    end with, after a dot.
    """

    r: int
    lora_alpha: float
    use_rslora: bool = False
    target_modules: str | tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_model_name_or_path: str = ""

    def target(self, module: str, *, is_plain: bool = True) -> str | None:
        """The name by which a module is targeted, its own or its weight's, as patterns see it; None: it is not.

        ``is_plain``: it is a linear layer, and neither head nor router.
        """
        if self.targets(module, is_plain=is_plain):
            return module
        return f"{module}.weight" if self.targets_parameter(f"{module}.weight") else None

    def targets(self, module: str, *, is_plain: bool = True) -> bool:
        """Whether a module gets a low-rank update by ``target_modules``; ``is_plain``: see ``target``."""
        if _is_named(self.exclude_modules, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == ALL_LINEAR:
                return is_plain
            return re.fullmatch(self.target_modules, module) is not None
        if module in self.target_modules:
            return True
        return _is_named(self.target_modules, module) and self._is_of_layers(module)

    def targets_parameter(self, parameter: str) -> bool:
        """Whether a parameter is named itself, as experts are, and a router may be."""
        return _is_named(self.target_parameters, parameter)

    def saves(self, tensor: str) -> bool:
        """Whether a tensor is of a module that the adapter replaces whole."""
        return any(is_in_module(tensor, name) for name in self.modules_to_save)

    def rank(self, target: str) -> int:
        """Rank of the update of what is targeted by a name."""
        return _by_pattern(self.rank_pattern, target, self.r)

    def scaling(self, target: str) -> float:
        """What that update is multiplied by: alpha / r, or alpha / √r."""
        rank, alpha = self.rank(target), _by_pattern(self.alpha_pattern, target, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _is_of_layers(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        named = [re.compile(rf"(?:^|.*?\.){name}\.(?P<{_LAYER}>\d+)\.") for name in self.layers_pattern]
        found = next((match for pattern in named or [_FIRST_LAYER] if (match := pattern.match(module))), None)
        return found is not None and found[_LAYER] is not None and int(found[_LAYER]) in self.layers_to_transform


def read_adapter_config(document: dict[str, Any]) -> tuple[AdapterConfig | None, list[str]]:
    """The configuration, and everything that is wrong with it or not implemented.

    None only where something cannot be read: with options that are not implemented the rest can still be checked.
    """
    if document.get("peft_type") != "LORA":
        return None, [f"adapter_config.json: peft_type is {brief(document.get('peft_type'))}, expected 'LORA'"]
    problems: list[str] = []
    read = _Reader(document, problems)
    fields: dict[str, Any] = {
        "r": read.number("r", integer=True, default=_DEFAULT),
        "lora_alpha": read.number("lora_alpha", default=_DEFAULT),
        "use_rslora": read.flag("use_rslora"),
        "target_modules": read.names("target_modules", or_pattern=True),
        "target_parameters": read.names("target_parameters"),
        "exclude_modules": read.names("exclude_modules", or_pattern=True),
        "modules_to_save": read.names("modules_to_save"),
        "layers_pattern": read.names("layers_pattern", single=True),
        "layers_to_transform": read.layers(),
        "rank_pattern": read.patterns("rank_pattern", integer=True),
        "alpha_pattern": read.patterns("alpha_pattern"),
        "base_model_name_or_path": str(document.get("base_model_name_or_path") or ""),
    }
    if fields["layers_to_transform"] and isinstance(fields["target_modules"], str):
        problems.append("adapter_config.json: layers_to_transform goes with a list of target_modules, not a pattern")
    return None if problems else AdapterConfig(**fields), problems + _refused(document)


def _refused(document: dict[str, Any]) -> list[str]:
    """Options that are on and not implemented, one sentence each. What is not known is refused unless it is off."""
    problems = []
    for name, value in document.items():
        is_off = value in (None, False, "none") or (value in ({}, []) and not _ON_IF_THERE.fullmatch(name))
        if name not in _READ | _OF_TRAINING and not is_off:
            problems.append(
                f"adapter_config.json: {name}={brief(value)} is not implemented. Train or merge without it."
            )
    if (bias := document.get("bias", "none")) != "none":
        problems.append(f"adapter_config.json: bias={brief(bias)} is not implemented, expected 'none'")
    init = document.get("init_lora_weights", True)
    if init is not None and init not in _INITS:
        what = "begins by changing the base's weights, which are not in the adapter"
        problems.append(f"adapter_config.json: init_lora_weights={brief(init)} {what}. Convert it to plain LoRA.")
    return problems


class _Reader:
    """Values of a document by kind; what is of another kind becomes a problem."""

    def __init__(self, document: dict[str, Any], problems: list[str]) -> None:
        self.document, self.problems = document, problems

    def number(self, name: str, *, default: float, integer: bool = False) -> Any:
        return self._number(name, self.document.get(name, default), integer=integer)

    def flag(self, name: str) -> bool:
        found = self.document.get(name)
        if found is not None and type(found) is not bool:
            self._expected(name, found, "true or false")
        return bool(found)

    def names(self, name: str, *, or_pattern: bool = False, single: bool = False) -> Any:
        found = self.document.get(name)
        if found is None:
            return ()
        if isinstance(found, str) and (or_pattern or single):
            self._compiles(name, found)
            names = (found,) if found else ()  # PEFT takes an empty pattern of layers for none
            return names if single else found
        if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
            self._expected(name, found, "a list of names" + (" or a pattern" if or_pattern else ""))
            return ()
        if name in ("modules_to_save", "layers_pattern"):  # which PEFT puts into patterns as they stand
            for one in found:
                self._compiles(name, one)
        return tuple(found)

    def layers(self) -> tuple[int, ...]:
        found = self.document.get("layers_to_transform")
        found = [found] if type(found) is int else found
        if found is None:
            return ()
        if not isinstance(found, list) or not all(type(one) is int and one >= 0 for one in found):
            self._expected("layers_to_transform", found, "numbers of layers")
            return ()
        return tuple(found)

    def patterns(self, name: str, *, integer: bool = False) -> dict[str, Any]:
        found = self.document.get(name)
        if not isinstance(found, dict | None):
            self._expected(name, found, "an object of patterns and numbers")
            return {}
        for pattern in found or {}:
            self._compiles(name, pattern)
        return {
            pattern: self._number(f"{name}[{brief(pattern)}]", value, integer=integer)
            for pattern, value in (found or {}).items()
        }

    def _number(self, name: str, found: Any, *, integer: bool) -> Any:
        is_rank = integer and type(found) is int and 1 <= found <= _MOST_RANK
        is_alpha = not integer and type(found) in (int, float) and abs(found) <= _MOST_ALPHA
        if not (is_rank or is_alpha):
            expected = f"an integer from 1 to {_MOST_RANK}" if integer else "a finite number that float32 holds"
            self._expected(name, found, expected)
        return found

    def _compiles(self, name: str, pattern: str) -> None:
        if why := regex_problem(pattern):
            self._expected(name, pattern, f"a regular expression ({why})")

    def _expected(self, name: str, found: Any, what: str) -> None:
        self.problems.append(f"adapter_config.json: {name} is {brief(found)}, expected {what}")


def is_in_module(tensor: str, name: str) -> bool:
    """Whether a tensor is of a module whose path ends with ``name``, or of one below it."""
    parts = tensor.split(".")
    return any(".".join(parts[:end]).endswith(name) for end in range(1, len(parts)))


def is_called(path: str, name: str) -> bool:
    """Whether ``name`` is a path or its end, after a dot."""
    return path == name or path.endswith(f".{name}")


def _is_named(names: str | tuple[str, ...], path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(is_called(path, name) for name in names)


def _by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that ``path`` ends with; patterns are read in the order of the document."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)
