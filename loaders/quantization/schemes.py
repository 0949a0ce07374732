"""What a checkpoint's quantisation documents say, resolved to one scheme per module.

ModelOpt writes ``hf_quant_config.json`` and ``quantization_config`` in config.json, compressed-tensors only the latter.
Both say it with patterns, in spellings of their own; here they become a table from module paths to schemes, so that two
documents that mean the same are equal and nothing behind this file knows a pattern.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

BLOCK = 16  # weights that share a block scale, consecutive ones of the last axis

KV_LEAVES = ("k_scale", "v_scale")  # of key and value projections, where they are kept in FP8

Spelling = Literal["modelopt", "compressed-tensors"]
KVCache = Literal["scaled", "cast"]  # in FP8: by scales of the checkpoint, or as they are, the scale being 1


class Part(NamedTuple):
    """One tensor of a quantised weight: its leaf name, the axes behind the stacks, its safetensors dtype."""

    leaf: str
    dims: str
    dtype: str


class Activations(NamedTuple):
    """What a model rounds beside its weights: inputs of quantised layers; keys and values, to FP8."""

    inputs: bool
    cache: bool


WEIGHTS_ONLY = Activations(inputs=False, cache=False)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weight of one module is stored and whether its input is quantised too.

    Attributes:
        weights: ``nvfp4``: 4-bit codes, a scale for every 16, one for all; ``fp8``: 8-bit floats, one scale for all.
        activations: the checkpoint has a scale for the input, which is quantised before the product.
        spelling: whose words the tensors go by. ModelOpt's scales multiply; compressed-tensors' global ones divide.
    """

    weights: Literal["nvfp4", "fp8"]
    activations: bool
    spelling: Spelling = "modelopt"

    @property
    def divides(self) -> bool:
        """Whether global scales are what a value is divided by to get it back."""
        return self.spelling == "compressed-tensors" and self.weights == "nvfp4"

    @property
    def leaves(self) -> dict[str, str]:
        """Role -> leaf name: ``codes``, ``block``, ``global`` and, with activations, ``input``."""
        if self.weights == "fp8":
            names = {"codes": "weight", "global": "weight_scale", "input": "input_scale"}
        elif self.spelling == "modelopt":
            names = {
                "codes": "weight",
                "block": "weight_scale",
                "global": "weight_scale_2",
                "input": "input_scale",
            }
        else:
            names = {
                "codes": "weight_packed",
                "block": "weight_scale",
                "global": "weight_global_scale",
                "input": "input_global_scale",
            }
        return names if self.activations else {role: leaf for role, leaf in names.items() if role != "input"}

    def parts(self, dims: str) -> tuple[Part, ...]:
        """The tensors of a weight with axes ``dims``, the last of which is its input."""
        out, inner = dims.split()
        scalar = "1" if self.divides else ""
        found = {
            "codes": (f"{out} {inner}", "F8_E4M3") if self.weights == "fp8" else (f"{out} {inner}/2", "U8"),
            "block": (f"{out} {inner}/{BLOCK}", "F8_E4M3"),
            "global": (scalar, "F32"),
            "input": (scalar, "F32"),
        }
        return tuple(Part(leaf, *found[role]) for role, leaf in self.leaves.items())

    def __str__(self) -> str:
        return {
            ("nvfp4", True): "NVFP4 with quantised inputs",
            ("nvfp4", False): "NVFP4, weights only",
            ("fp8", True): "FP8 with quantised inputs",
            ("fp8", False): "FP8, weights only",
        }[self.weights, self.activations]


@dataclass(frozen=True, slots=True)
class Quantization:
    """Which modules are quantised, and how. Module paths are ours, whatever the checkpoint's prefix.

    Attributes:
        schemes: module path -> scheme, by path; the experts of a layer are one module.
        kv_cache: how keys and values are rounded to FP8; None: they are not.
        spelling: of the documents it came from, and of those an export is to have.
    """

    schemes: tuple[tuple[str, Scheme], ...]
    kv_cache: KVCache | None = None
    spelling: Spelling = "modelopt"

    @classmethod
    def of(cls, schemes: Mapping[str, Scheme], *, kv_cache: KVCache | None = None, spelling: Spelling) -> Quantization:
        """From a table in any order."""
        return cls(tuple(sorted(schemes.items())), kv_cache, spelling)

    @property
    def table(self) -> dict[str, Scheme]:
        """Module path -> scheme."""
        return dict(self.schemes)

    @property
    def has_activations(self) -> bool:
        """Whether the inputs of any layer are quantised."""
        return any(scheme.activations for _, scheme in self.schemes)

    def of_modules(self, paths: Collection[str]) -> Quantization | None:
        """The same of these modules alone, and of keys and values that they make; None: none of it."""
        schemes = tuple((path, scheme) for path, scheme in self.schemes if path in paths)
        kv_cache = self.kv_cache if any(path.endswith(".k_proj") for path in paths) else None
        return replace(self, schemes=schemes, kv_cache=kv_cache) if schemes or kv_cache else None

    def differences(self, other: Quantization | None) -> list[str]:
        """What this is and ``other`` is not, one line a module; of another exporter's words, that alone."""
        if other is None:
            return ["it is quantised, and the model is not"]
        if self.spelling != other.spelling:
            return [f"its tensors go by the words of {self.spelling}, expected those of {other.spelling}"]
        found = []
        if self.kv_cache != other.kv_cache:
            found.append(f"it has {_CACHES[self.kv_cache]}, expected {_CACHES[other.kv_cache]}")
        ours, theirs = self.table, other.table
        return found + [
            f"{path} is {ours.get(path, 'not quantised')}, expected {theirs.get(path, 'not quantised')}"
            for path in sorted(ours.keys() | theirs.keys())
            if ours.get(path) != theirs.get(path)
        ]


_CACHES: dict[KVCache | None, str] = {
    "scaled": "an FP8 cache with scales",
    "cast": "an FP8 cache without scales",
    None: "no FP8 cache",
}


def activations_of(quantization: Quantization | None, asked: bool | None = None) -> Activations:
    """What is rounded beside the weights: what the checkpoint says (None), nothing (False), or inputs at least (True).

    Raises:
        ValueError: it is asked for, and the checkpoint has no scales for it; or something else than that was given.
    """
    if asked is not None and not isinstance(asked, bool):
        raise ValueError(f"activation_quantization={asked!r} is not understood, expected None, True or False")
    has_inputs = quantization is not None and quantization.has_activations
    has_cache = quantization is not None and quantization.kv_cache is not None
    if asked and not has_inputs:
        cache = " Its FP8 cache needs no asking for." if has_cache else ""
        raise ValueError(
            f"activation_quantization=True, but the checkpoint has no scales for inputs. Give None or False.{cache}"
        )
    return WEIGHTS_ONLY if asked is False else Activations(has_inputs, has_cache)


def kv_leaf(tensor: str) -> str | None:
    """``k_scale`` or ``v_scale`` for the weight of a key or value projection, else None."""
    projections: dict[str, str] = {"k_proj": KV_LEAVES[0], "v_proj": KV_LEAVES[1]}
    return projections.get(tensor.removesuffix(".weight").rpartition(".")[2])


def summary(quantization: Quantization | None) -> dict[str, list[str]]:
    """Scheme, in words -> the modules that have it."""
    found: dict[str, list[str]] = {}
    for path, scheme in () if quantization is None else quantization.schemes:
        found.setdefault(str(scheme), []).append(path)
    return found


def has_nvfp4(quantization: Quantization | None) -> bool:
    """Whether any module is NVFP4."""
    return quantization is not None and any(scheme.weights == "nvfp4" for _, scheme in quantization.schemes)
