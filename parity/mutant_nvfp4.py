"""Mutants of NVFP4: the format as it is read, scales of fused layers, quantised inputs, the FP8 cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from loaders.nvfp4_layout import swizzle
from parity import mutant_nvfp4_plants as plants
from parity.mutant_bench import Subject
from parity.mutant_nvfp4_bench import (
    ALIGNED,
    CACHED,
    DIVIDING,
    DIVIDING_EXPERTS,
    EXPERTS,
    MIXED,
    W4A4,
    nvfp4_inputs,
    nvfp4_layers,
    nvfp4_swizzled,
    nvfp4_weights,
)
from parity.mutant_nvfp4_life_list import NVFP4_LIFE
from parity.mutant_nvfp4_load_list import NVFP4_LOADING
from parity.mutant_nvfp4_runs import (
    nvfp4_activations,
    nvfp4_cache,
    nvfp4_forward,
    nvfp4_forward_bf16,
)
from parity.mutant_plants import BOTH, of, wrapped
from parity.mutants import Mutant

_TORCH = ("torch",)
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def _one(
    name: str,
    source: str,
    plant: Callable[[], Any],
    says: str,
    subject: Subject = W4A4,
    detector: Any = nvfp4_layers,
    backends: tuple[str, ...] = BOTH,
    **more: Any,
) -> Mutant:
    return of("loader", f"nvfp4_{name}", source, plant, says, subject, detector=detector, backends=backends, **more)


_K_DOUBLED = plants.on_leaf("weight_scale_2", lambda scale: scale * 2, part="k_proj")

_FORMAT = [
    _one(
        "nibbles_swapped",
        "parity 52",
        plants.products(plants.in_nibbles),
        "the odd element first",
        detector=nvfp4_forward,
    ),
    _one(
        "nibbles_swapped_as_loaded",
        "parity 52",
        plants.on_leaf("weight", lambda codes: codes << 4 | codes >> 4),
        "the odd element first, already in the loader",
        detector=nvfp4_forward_bf16,
    ),
    _one("sign_dropped", "parity 52", plants.on_leaf("weight", lambda codes: codes & 0x77), "magnitudes only"),
    _one(
        "scale_of_the_neighbour", "parity 53", plants.products(plants.of_the_neighbour), "the scale of the block before"
    ),
    _one(
        "scale_of_the_row_above",
        "parity 53",
        plants.on_leaf("weight_scale", lambda scale: np.roll(scale, 1, 0)),
        "the scales of the row before",
        detector=nvfp4_forward,
    ),
    _one(
        "scale_of_the_neighbour_in_experts",
        "parity 53",
        plants.products(plants.of_the_neighbour),
        "the scale of the block before, in plants.products of experts",
        EXPERTS,
    ),
    _one(
        "scales_swizzled_by_the_loader",
        "parity 53",
        plants.on_leaf("weight_scale", swizzle),
        "scales in a kernel's order, read by rows",
        ALIGNED,
    ),
    _one(
        "swizzled_twice",
        "parity 53",
        wrapped("kernels.nvfp4_blackwell:swizzled", lambda once, scale: once(once(scale))),
        "an order that is no involution, applied twice",
        ALIGNED,
        nvfp4_swizzled,
        _TORCH,
    ),
    _one(
        "swizzle_never_undone",
        "parity 53",
        wrapped(
            "kernels.nvfp4_blackwell:unswizzled",
            lambda undo, scale, shape: scale[..., : shape[-2], : shape[-1]].contiguous(),
        ),
        "swizzled scales read by rows",
        ALIGNED,
        nvfp4_swizzled,
        _TORCH,
    ),
    _one(
        "padded_swizzle_never_undone",
        "parity 53",
        wrapped(
            "kernels.nvfp4_blackwell:unswizzled",
            lambda undo, scale, shape: scale[..., : shape[-2], : shape[-1]].contiguous(),
        ),
        "swizzled and padded scales read by rows",
        detector=nvfp4_swizzled,
        backends=_TORCH,
    ),
    _one(
        "global_scale_reciprocal",
        "parity 54",
        plants.of_layers("multiplier", lambda of_, scale, scheme: 1 / of_(scale, scheme)),
        "the other convention's global scale",
    ),
    _one(
        "divisor_multiplied",
        "parity 54",
        plants.of_layers("multiplier", lambda of_, scale, scheme: scale),
        "a divisor of compressed-tensors is multiplied",
        DIVIDING,
    ),
    _one(
        "divisor_multiplied_in_experts",
        "parity 54",
        plants.of_layers("multiplier", lambda of_, scale, scheme: scale),
        "a divisor of compressed-tensors is multiplied, in experts",
        DIVIDING_EXPERTS,
    ),
    _one(
        "block_of_32", "parity 55", plants.on_leaf("weight_scale", plants.every_other), "one block scale for 32 weights"
    ),
    _one("scales_as_e5m2", "parity 56", plants.on_leaf("weight_scale", plants.as_e5m2), "block scales read as e5m2"),
    _one(
        "scales_as_e5m2_in_bits",
        "parity 56",
        plants.on_leaf("weight_scale", plants.as_e5m2),
        "block scales read as e5m2",
        detector=nvfp4_weights,
    ),
    _one(
        "silent_bfloat16",
        "parity 62",
        wrapped("layers.quantized:NVFP4Linear.project", plants.through_bfloat16),
        "products of weights dequantised to bfloat16",
    ),
    _one(
        "fp8_scale_dropped",
        "parity 54",
        wrapped("layers.quantized:FP8Linear.project", lambda run, self, x: run(self, x) / self.weight_scale[...]),
        "codes of an FP8 layer without their scale",
        MIXED,
    ),
]

_FUSED = [
    _one("qkv_scales_by_max", "parity 58", plants.shared(_QKV, max), "q, k and v get the largest of their scales"),
    _one("qkv_scales_by_min", "parity 58", plants.shared(_QKV, min), "q, k and v get the smallest of their scales"),
    _one(
        "qkv_scales_by_last",
        "issue 4",
        plants.shared(_QKV, lambda s: s[-1]),
        "the scale of v, plants.loaded last, wins",
    ),
    _one(
        "gate_up_scales_by_max",
        "parity 58",
        plants.shared(_GATE_UP, max),
        "gate and up get the larger scale",
        detector=nvfp4_forward,
    ),
    _one("k_scale_doubled", "parity 54", _K_DOUBLED, "a wrong global scale on k alone"),
    _one(
        "k_scale_doubled_in_logits",
        "parity 54",
        _K_DOUBLED,
        "a wrong global scale on k alone",
        detector=nvfp4_forward_bf16,
        equivalent="the norm of k divides by any factor on k: logits cannot prove its scale, the layer's output does",
    ),
    _one(
        "expert_takes_the_next_ones_scale",
        "parity 24",
        plants.on_leaf("_weight_scale_2", lambda scale: np.roll(scale, -1, 0)),
        "expert i is multiplied by the scale of i + 1",
        EXPERTS,
    ),
    _one(
        "up_takes_the_gates_scale",
        "parity 58",
        plants.on_leaf("w13_weight_scale_2", lambda scale: np.repeat(scale[:, :1], 2, 1)),
        "gate and up of an expert share the gate's scale",
        EXPERTS,
    ),
    _one(
        "gate_up_order",
        "issue 4",
        plants.loaded(plants.turned_halves),
        "w1 where w3 is: silu on up",
        EXPERTS,
        nvfp4_forward,
    ),
]

_INPUTS = [
    _one(
        "input_scale_ignored",
        "parity 61",
        wrapped("load:quantizes_activations", lambda asks, checkpoint, asked: False),
        "W4A4 computed with inputs as they are",
        detector=nvfp4_inputs,
    ),
    _one(
        "inputs_unrounded",
        "parity 62",
        plants.rounding_inputs(lambda round_, np_, x, scale: x / scale),
        "inputs are scaled and never rounded: suspiciously good",
        detector=nvfp4_inputs,
    ),
    _one(
        "experts_inputs_unrounded",
        "parity 62",
        plants.rounding_inputs(lambda round_, np_, x, scale: x / scale),
        "inputs of experts are scaled and never rounded: suspiciously good",
        EXPERTS,
        nvfp4_inputs,
    ),
    _one(
        "input_scale_reciprocal",
        "parity 61",
        plants.rounding_inputs(lambda round_, np_, x, scale: round_(x, 1 / scale)),
        "inputs are rounded under the reciprocal scale",
        detector=nvfp4_inputs,
    ),
    _one(
        "input_scale_twice",
        "parity 61",
        plants.rounding_inputs(lambda round_, np_, x, scale: round_(x, scale) * scale),
        "the input scale is in alpha and in the inputs",
        detector=nvfp4_inputs,
    ),
    _one(
        "input_scale_divisor_multiplied",
        "parity 54",
        plants.of_layers("multiplier", lambda of_, scale, scheme: scale),
        "divisors of inputs and weights are multiplied",
        DIVIDING,
        nvfp4_inputs,
    ),
    _one(
        "up_takes_the_gates_input_scale",
        "issue 4",
        plants.on_leaf("w13_input_scale", lambda scale: np.repeat(scale[:, :1], 2, 1)),
        "one input scale for gate and up",
        EXPERTS,
        nvfp4_inputs,
    ),
    _one(
        "input_blocks_in_float32",
        "parity 56",
        plants.rounding_inputs(plants.with_plain_scales),
        "block scales of inputs are not rounded to e4m3",
        detector=nvfp4_inputs,
    ),
    _one(
        "weights_only_not_heeded",
        "issue 4",
        wrapped("load:quantizes_activations", lambda asks, checkpoint, asked: asks(checkpoint, None)),
        "activation_quantization=False is not heeded",
    ),
    _one(
        "input_ties_up",
        "parity 57",
        plants.codes_of_inputs((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)),
        "inputs that tie go up, not to the even code",
        detector=nvfp4_activations,
    ),
    _one(
        "inputs_truncated",
        "parity 57",
        plants.codes_of_inputs((0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
        "inputs are truncated, not rounded",
        detector=nvfp4_activations,
    ),
]


def _cache(name: str, plant: Callable[[], Any], says: str) -> Mutant:
    return _one(name, "issue 4", plant, says, CACHED, nvfp4_cache)


_CACHE = [
    _cache(
        "cache_scales_ignored", plants.cache_rounding(lambda r, a, t, x, s: x), "keys and values are kept as they are"
    ),
    _cache(
        "cache_scales_swapped", plants.cache_rounding(plants.other_scale), "keys are rounded under the scale of values"
    ),
    _cache("keys_rounded_before_rotation", plants.before_rotation, "keys are rounded, then rotated"),
]

NVFP4: list[Mutant] = [*_FORMAT, *_FUSED, *_INPUTS, *_CACHE, *NVFP4_LOADING, *NVFP4_LIFE]
