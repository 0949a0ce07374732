"""Mutants of what makes and names quantised weights: the codec, quantise-on-load, quantisation documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from loaders.quantization.patterns import FUSED
from parity.mutants import Mutant, Patch
from parity.mutants.bench import Subject
from parity.mutants.nvfp4_load import (
    EXCLUDING,
    PLAIN,
    PLAIN_EXPERTS,
    nvfp4_codec,
    nvfp4_documents,
    nvfp4_on_load,
)
from parity.mutants.plants import BOTH, of, wrapped


def _bounds(*bounds: float) -> Callable[[], list[Patch]]:
    """The codec's code of a magnitude is how many of ``bounds`` it reaches."""

    def codes(nearest: Any, magnitude: np.ndarray, is_negative: np.ndarray) -> np.ndarray:
        count = sum((magnitude >= bound).astype(np.uint8) for bound in bounds)
        return count | np.left_shift(is_negative.view(np.uint8), 3)

    return wrapped("loaders.nvfp4:_codes", codes)


_TRUNCATED = _bounds(0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _pairs(amax: Any, magnitude_16q: np.ndarray, dtype: Any) -> np.ndarray:
    found = amax(magnitude_16q, dtype)
    even = len(found) - len(found) % 2
    found[:even] = found[:even].reshape(-1, 2).max(1).repeat(2)
    return found


def _exchanged(quantize: Any, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    codes_16q, scale_q = quantize(*args)
    return codes_16q.reshape(8, 2, -1)[:, ::-1].reshape(codes_16q.shape), scale_q


def _kept_amax() -> list[Patch]:
    known: dict[str, float] = {}

    def note(unquantisable: Any, self: Any, group: str, weights: Any) -> list[str]:
        problems = unquantisable(self, group, weights)
        self._amax[group] = known.setdefault(group, self._amax[group])
        return problems

    return wrapped("loaders.quantization.quantized:QuantizedCheckpoint._unquantisable", note)()


def _kept_codes() -> list[Patch]:
    known: list[Any] = []

    def quantized(original: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        known.append(original(checkpoint, *args, **kwargs))
        return known[0]

    return wrapped("loaders.quantization.quantize:quantized", quantized)()


def _of(
    name: str, source: str, plant: Callable[[], Any], says: str, subject: Subject, detector: Any, **more: Any
) -> Any:
    return of("loader", f"nvfp4_{name}", source, plant, says, subject, detector=detector, **more)


def _codec(name: str, source: str, plant: Callable[[], Any], says: str) -> Mutant:
    return _of(f"codec_{name}", source, plant, says, PLAIN, nvfp4_codec)


def _on_load(
    name: str, source: str, plant: Callable[[], Any], says: str, subject: Subject = PLAIN, **more: Any
) -> Mutant:
    return _of(f"on_load_{name}", source, plant, says, subject, nvfp4_on_load, **{"backends": BOTH} | more)


def _document(name: str, plant: Callable[[], Any], says: str, **more: Any) -> Mutant:
    return _of(f"document_{name}", "issue 4", plant, says, EXCLUDING, nvfp4_documents, **more)


def _excused(excused: str) -> Callable[[], list[Patch]]:
    """Modules left alone for reasons with this word in them are quantised too."""

    def reason(original: Any, rule: Any, shape: Any) -> Any:
        found = original(rule, shape)
        return None if found and excused in found else found

    return wrapped("loaders.quantization.quantizable:_reason", reason)


def _one_fused_name(expanded: Any, given: Any) -> list[str]:
    """Each pattern with its first fused name expanded alone."""
    found = []
    for pattern in given:
        first = next((name for name in FUSED if name in pattern), None)
        found += [pattern] if first is None else [pattern.replace(first, part) for part in FUSED[first]]
    return found


NVFP4_LOADING: list[Mutant] = [
    _codec("truncates", "parity 57", _TRUNCATED, "codes are truncated, not rounded"),
    _codec("ties_up", "parity 57", _bounds(0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0), "ties go away from zero"),
    _codec("block_of_32", "parity 55", wrapped("loaders.nvfp4:_block_amax", _pairs), "two blocks share their amax"),
    _codec(
        "no_least_scale",
        "parity 59",
        lambda: [Patch("loaders.nvfp4:E4M3_MIN", lambda original, backend: 0.0)],
        "the scale of a tiny block vanishes",
    ),
    _codec(
        "nibbles_swapped",
        "parity 52",
        wrapped("loaders.nvfp4:_quantize", _exchanged),
        "the odd element first, as it is written",
    ),
    _on_load("truncates", "parity 57", _TRUNCATED, "quantise-on-load truncates"),
    _on_load(
        "scales_apart",
        "parity 58",
        wrapped("loaders.quantization.quantizable:_group", lambda group, module: module),
        "q, k and v get scales of their own where exporters give them one",
    ),
    _on_load("amax_latched", "law 5", _kept_amax, "a reload quantises under the scales of the first load"),
    _on_load("codes_latched", "law 5", _kept_codes, "a reload serves the codes of the first load"),
    _on_load("head_quantised", "parity 60", _excused("head"), "the head is quantised too"),
    _on_load(
        "router_quantised",
        "parity 60",
        _excused("router"),
        "the router is quantised too",
        PLAIN_EXPERTS,
    ),
    _document(
        "patterns_ignored",
        wrapped("loaders.quantization.documents:patterns", lambda patterns, given, **how: lambda names: False),
        "exclude_modules is not read",
        backends=BOTH,
    ),
    _document(
        "fused_not_expanded",
        wrapped("loaders.quantization.patterns:_expanded", lambda expanded, given: list(given)),
        "qkv_proj is a name of its own, and of no module",
    ),
    _document(
        "one_fused_name_expanded",
        wrapped("loaders.quantization.patterns:_expanded", _one_fused_name),
        "of two fused names in a pattern the second is left as it is",
    ),
    _document(
        "names_not_prefixes",
        wrapped("loaders.quantization.patterns:_within", lambda within, name, sizes: [name]),
        "a name stands for itself, not for what is below it",
    ),
    _document(
        "unknown_algorithm_taken",
        wrapped("loaders.quantization.documents:_algorithm", lambda known, where, name: (known(where, name)[0], [])),
        "an algorithm nobody knows is a bfloat16 model",
    ),
    _document(
        "group_size_not_read",
        wrapped("loaders.quantization.documents:_size_problems", lambda problems, *args: []),
        "blocks of 32 are read as blocks of 16",
    ),
    _document(
        "unknown_cache_taken",
        wrapped("loaders.quantization.documents:_kv_cache", lambda read, *args: (read(*args)[0], [])),
        "a cache in INT8 is one in bfloat16",
    ),
    _document(
        "no_inputs_not_read",
        wrapped("loaders.quantization.documents:_is_weight_only", lambda is_, groups: False),
        "NVFP4 whose groups name no input has input scales all the same",
    ),
]
