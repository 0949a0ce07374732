"""Mutants of quantised inputs and of the FP8 cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from parity.mutants import Mutant
from parity.mutants import nvfp4_plants as plants
from parity.mutants.nvfp4_bench import CACHED, DIVIDING, EXPERTS, nvfp4_inputs
from parity.mutants.nvfp4_plants import quantised_mutant
from parity.mutants.nvfp4_runs import nvfp4_activations, nvfp4_cache
from parity.mutants.plants import wrapped

_INPUTS = [
    quantised_mutant(
        "input_scale_ignored",
        "parity 61",
        wrapped("load:activations_of", lambda asks, quantization, asked: asks(quantization, False)),
        "W4A4 computed with inputs as they are",
        detector=nvfp4_inputs,
    ),
    quantised_mutant(
        "inputs_unrounded",
        "parity 62",
        plants.rounding_inputs(lambda round_, np_, x, scale: x / scale),
        "inputs are scaled and never rounded: suspiciously good",
        detector=nvfp4_inputs,
    ),
    quantised_mutant(
        "experts_inputs_unrounded",
        "parity 62",
        plants.rounding_inputs(lambda round_, np_, x, scale: x / scale),
        "inputs of experts are scaled and never rounded: suspiciously good",
        EXPERTS,
        nvfp4_inputs,
    ),
    quantised_mutant(
        "input_scale_reciprocal",
        "parity 61",
        plants.rounding_inputs(lambda round_, np_, x, scale: round_(x, 1 / scale)),
        "inputs are rounded under the reciprocal scale",
        detector=nvfp4_inputs,
    ),
    quantised_mutant(
        "input_scale_twice",
        "parity 61",
        plants.rounding_inputs(lambda round_, np_, x, scale: round_(x, scale) * scale),
        "the input scale is in alpha and in the inputs",
        detector=nvfp4_inputs,
    ),
    quantised_mutant(
        "input_scale_divisor_multiplied",
        "parity 54",
        plants.of_layers("multiplier", lambda of_, scale, scheme: scale),
        "divisors of inputs and weights are multiplied",
        DIVIDING,
        nvfp4_inputs,
    ),
    quantised_mutant(
        "up_takes_the_gates_input_scale",
        "issue 4",
        plants.on_leaf("w13_input_scale", lambda scale: np.repeat(scale[:, :1], 2, 1)),
        "one input scale for gate and up",
        EXPERTS,
        nvfp4_inputs,
    ),
    quantised_mutant(
        "input_blocks_in_float32",
        "parity 56",
        plants.rounding_inputs(plants.with_plain_scales),
        "block scales of inputs are not rounded to e4m3",
        detector=nvfp4_inputs,
    ),
    quantised_mutant(
        "weights_only_not_heeded",
        "issue 4",
        wrapped("load:activations_of", lambda asks, quantization, asked: asks(quantization, None)),
        "activation_quantization=False is not heeded",
    ),
    quantised_mutant(
        "input_ties_up",
        "parity 57",
        plants.codes_of_inputs((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)),
        "inputs that tie go up, not to the even code",
        detector=nvfp4_activations,
    ),
    quantised_mutant(
        "inputs_truncated",
        "parity 57",
        plants.codes_of_inputs((0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
        "inputs are truncated, not rounded",
        detector=nvfp4_activations,
    ),
]


def _cache(name: str, plant: Callable[[], Any], says: str) -> Mutant:
    return quantised_mutant(name, "issue 4", plant, says, CACHED, nvfp4_cache)


_CACHE = [
    _cache(
        "cache_scales_ignored", plants.cache_rounding(lambda r, a, t, x, s: x), "keys and values are kept as they are"
    ),
    _cache(
        "cache_scales_swapped", plants.cache_rounding(plants.other_scale), "keys are rounded under the scale of values"
    ),
    _cache("keys_rounded_before_rotation", plants.before_rotation, "keys are rounded, then rotated"),
]

NVFP4_INPUTS: list[Mutant] = [*_INPUTS, *_CACHE]
