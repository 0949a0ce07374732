"""What a trace may hold: the names, their order of execution, and every check a file must pass.

Letters: B batch, T positions, D hidden_size, V vocab, X experts per token, N new tokens.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

SCHEMA = 1
HIDDEN = re.compile(r"hidden_states\.(0|[1-9][0-9]{0,8})")
ROUTING = re.compile(r"routing\.([1-9][0-9]{0,8})")
AFTER_LAYERS = ("final_hidden_state", "logits")  # in the order they are computed
MTP = ("mtp.hidden_state", "mtp.logits")  # T-1 positions: row t needs the token at t+1
AFTER = 1 << 30  # no model has so many layers
AMPLIFICATION = "amplification."  # before the name of a tensor: of rounding in it, by token; oracles alone have it
ANGLE_ERROR = "angle_error."  # likewise: how far off it is, by token, because angles are float32's
PROBE = "probe."  # before the number of a place: what a fault there does to the first tensor it reaches; oracles alone
INTEGERS = {"input_ids": 2, "attention_mask": 2, "generated_ids": 2}  # name -> rank


def activations(names: Iterable[str]) -> list[str]:
    """The float tensors that are compared, in the order a model computes them."""
    known = set(names)
    layers = sorted(hidden_layers(known))
    return [f"hidden_states.{i}" for i in layers] + [name for name in (*AFTER_LAYERS, *MTP) if name in known]


def hidden_layers(names: Iterable[str]) -> list[int]:
    """The i of every ``hidden_states.i``; 0 is the embeddings, i the residual stream after decoder layer i."""
    return [int(match[1]) for name in names if (match := HIDDEN.fullmatch(name))]


def routing_layers(names: Iterable[str]) -> list[int]:
    """The i of every ``routing.i``: the sparse decoder layers, counted from 1, in order."""
    return sorted(int(match[1]) for name in names if (match := ROUTING.fullmatch(name)))


def layer_of(name: str) -> int | None:
    """The decoder layer (from 1; 0 the embeddings) a tensor is read after; None for what follows the layers."""
    match = HIDDEN.fullmatch(name)
    return int(match[1]) if match else None


def module_of(name: str, text_path: str = "model") -> str:
    """The module whose result a tensor is, by its path in the checkpoint: what a reader is told instead of its name.

    ``text_path``: of the text model, where the checkpoint puts it.
    """
    if layer := layer_of(name):
        return f"{text_path}.layers.{layer - 1}"
    paths = {"hidden_states.0": f"{text_path}.embed_tokens", "final_hidden_state": f"{text_path}.norm"}
    paths |= {"logits": "lm_head", "mtp.hidden_state": "mtp.norm", "mtp.logits": "mtp.lm_head"}
    return paths.get(name, name)


def order_of(name: str) -> int:
    """When an activation is computed, as a number that grows; layers count as ``layer_of`` does."""
    layer = layer_of(name)
    return AFTER + [*AFTER_LAYERS, *MTP].index(name) if layer is None else layer


def order_of_module(path: str) -> int:
    """The same of the first activation that a module's result is part of; 0 is the embeddings'."""
    if (layer := re.search(r"\.layers\.(\d+)(\..+)?$", path)) is not None:
        return int(layer[1]) + 1
    ends = {"norm": "final_hidden_state", "lm_head": "logits"}
    return order_of(ends.get(path.rpartition(".")[2], "hidden_states.0"))


def text_path(weights: Iterable[str]) -> str:
    """Where a checkpoint puts its text model, from the names of its weights or modules; ``model`` where none says."""
    found = (re.match(r"(?!mtp\.)(.+?)\.layers\.(?:\d+|\*)\.", name) for name in weights)
    return next((match[1] for match in found if match), "model")


def routing_of(name: str) -> int | None:
    """The sparse decoder layer (from 1) whose choice of experts this is; None for any other tensor."""
    match = ROUTING.fullmatch(name)
    return int(match[1]) if match else None


def find_problems(tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> list[str]:
    """Everything that keeps tensors and metadata from being a trace, one sentence each."""
    return [*meta_problems(meta), *_tensor_problems(tensors)]


# what a reader is told how to run it again with
_FACTS = (
    *(("input_hash", str), ("checkpoint", str), ("inputs", str), ("adapter", str), ("row", int), ("decode", int)),
    *(("max_new_tokens", int), ("ignore_eos", bool)),
)


def meta_problems(meta: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with the metadata alone."""
    problems = []
    if meta.get("schema") != SCHEMA:
        problems.append(f"schema is {meta.get('schema')!r}, expected {SCHEMA}: was it written by another version?")
    for key in ("backend", "dtype"):
        if not (isinstance(meta.get(key), str) and meta[key]):
            problems.append(f"{key} is {meta.get(key)!r}, expected a non-empty string.")
    for key, kind in (("versions", dict), ("precision", dict), ("events", list), ("device", str), *_FACTS):
        if meta.get(key) is not None and not isinstance(meta[key], kind):
            problems.append(f"{key} is {meta[key]!r}, expected a {kind.__name__} or nothing.")
    adapter = meta["precision"].get("adapter") if isinstance(meta.get("precision"), dict) else None
    if adapter is not None and not isinstance(adapter, str):
        problems.append(f"precision.adapter is {adapter!r}, expected a digest or nothing.")
    problems += _probe_problems(meta.get("probes") or [])
    problems += _unprintable(meta)
    weights = meta.get("weights")
    if weights is not None and not (
        isinstance(weights, dict)
        and isinstance(weights.get("root"), str)
        and isinstance(weights.get("digests", {}), dict)
    ):
        problems.append("weights is not {digests: {name: hex}, root: hex}: write both, or leave the block out.")
    return problems


_PATHS = ("checkpoint", "inputs", "adapter", "events")  # may be called anything; whoever shows them escapes them


def _unprintable(meta: Mapping[str, Any]) -> list[str]:
    """Of names: they are shown in terminals, which obey some of what cannot be printed."""
    found, waiting = {}, [(key, value) for key, value in meta.items() if key not in _PATHS]
    for place, value in waiting:  # grows: a document may be nested deeper than Python calls
        if isinstance(value, dict | list):
            waiting += value.items() if isinstance(value, dict) else [(place, one) for one in value]
        found |= {text: place for text in (str(place), value) if isinstance(text, str) and not text.isprintable()}
    return [f"{ascii(text)} under {ascii(place)} holds what cannot be printed." for text, place in found.items()]


def _probe_problems(probes: Any) -> list[str]:
    """Of the faults an oracle tried: they decide what a comparison could have seen."""
    kinds = {"module": str, "kind": str, "size": float, "tensor": str, "moved": dict}
    for number, probe in enumerate(probes if isinstance(probes, list) else [probes]):
        if not (
            isinstance(probe, dict)
            and all(isinstance(probe.get(key), kind) for key, kind in kinds.items())
            and activations([probe["tensor"]])
            and all(_is_amount(amount) for amount in (probe["size"], *probe["moved"].values()))
            and probe["size"] > 0
        ):
            return [
                f"probes[{number}] is {probe!r}, expected {', '.join(kinds)}, as `tandem record` writes them: tensor is"
                " one that is compared, size and what moved are finite numbers >= 0."
            ]
    return []


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= sys.float_info.max


def _tensor_problems(tensors: Mapping[str, np.ndarray]) -> list[str]:
    names = activations(tensors)
    problems = [] if names else ["no logits and no hidden states in it: there is nothing to compare."]
    for name in names:
        if tensors[name].ndim != 3 or tensors[name].dtype not in (np.float32, np.float64):
            problems.append(f"{_what(tensors, name)}, expected float32 of rank 3.")
    problems += _integer_problems(tensors)
    if problems:
        return problems  # the sizes below are only defined once every rank is right

    first = next((name for name in names if name not in MTP), names[0])
    batch, length = tensors[first].shape[:2]
    length += first in MTP  # a trace of the draft alone still says what T was
    for name in names:
        want = (batch, length - (name in MTP))
        if tensors[name].shape[:2] != want:
            problems.append(f"{_what(tensors, name)}, expected {list(want)} + [size] from {first!r}.")
    for name in ("input_ids", "attention_mask", *(f"routing.{i}" for i in routing_layers(tensors))):
        if name in tensors and tensors[name].shape[:2] != (batch, length):
            problems.append(f"{_what(tensors, name)}, expected {[batch, length]} first, from {first!r}.")
    for name in names:
        shape = tensors[name].shape[:2]
        for widening in (AMPLIFICATION + name, ANGLE_ERROR + name):
            if widening in tensors and not _may_widen(tensors[widening], shape):
                what = _what(tensors, widening)
                problems.append(f"{what}, expected finite floats >= 0 of {list(shape)} from {name!r}.")
    for name, array in tensors.items():
        if name.startswith(PROBE) and (
            array.dtype.kind != "f" or array.shape[:2] != (batch, length) or not np.isfinite(array).all()
        ):
            problems.append(f"{_what(tensors, name)}, expected finite floats of {[batch, length]} + [size].")
    if "generated_ids" in tensors and len(tensors["generated_ids"]) != batch:
        problems.append(f"{_what(tensors, 'generated_ids')}, expected {batch} rows from {first!r}.")
    sizes = {tensors[name].shape[2] for name in names if "logits" not in name}
    if len(sizes) > 1:
        problems.append(f"hidden states of different sizes {sorted(sizes)}: they are not from one model.")
    return problems


def _may_widen(array: np.ndarray, shape: tuple[int, ...]) -> bool:
    # limits: what is not a number would widen them without end
    return array.dtype.kind == "f" and array.shape == shape and bool(np.isfinite(array).all() and (array >= 0).all())


def _integer_problems(tensors: Mapping[str, np.ndarray]) -> list[str]:
    ranks = INTEGERS | {f"routing.{i}": 3 for i in routing_layers(tensors)}
    problems = []
    for name, rank in ranks.items():
        if name in tensors and (tensors[name].ndim != rank or tensors[name].dtype.kind not in "iub"):
            problems.append(f"{_what(tensors, name)}, expected integers of rank {rank}.")
    margins, ids = tensors.get("generated_margins"), tensors.get("generated_ids")
    if margins is not None and (margins.dtype.kind != "f" or ids is None or margins.shape != ids.shape):
        problems.append(f"{_what(tensors, 'generated_margins')}, expected floats of the shape of generated_ids.")
    mask = tensors.get("attention_mask")
    if mask is not None and mask.size and not np.isin(mask, (0, 1)).all():
        problems.append("attention_mask has values other than 0 (padding) and 1 (real).")
    return problems


def _what(tensors: Mapping[str, np.ndarray], name: str) -> str:
    return f"tensor {name!r} is {tensors[name].dtype} {list(tensors[name].shape)}"
