"""Mutants of NVFP4: the format as it is read, and the scales of layers that are multiplied together."""

from __future__ import annotations

import numpy as np

from loaders.quantization.nvfp4_layout import swizzle
from parity.mutants import Mutant
from parity.mutants import nvfp4_plants as plants
from parity.mutants.nvfp4_bench import (
    ALIGNED,
    DIVIDING,
    DIVIDING_EXPERTS,
    EXPERTS,
    MIXED,
    nvfp4_swizzled,
    nvfp4_weights,
)
from parity.mutants.nvfp4_inputs import NVFP4_INPUTS
from parity.mutants.nvfp4_life_list import NVFP4_LIFE
from parity.mutants.nvfp4_load_list import NVFP4_LOADING
from parity.mutants.nvfp4_plants import quantised_mutant
from parity.mutants.nvfp4_runs import (
    nvfp4_forward,
    nvfp4_forward_bf16,
)
from parity.mutants.plants import wrapped

_TORCH = ("torch",)
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


_K_DOUBLED = plants.on_leaf("weight_scale_2", lambda scale: scale * 2, part="k_proj")

_FORMAT = [
    quantised_mutant(
        "nibbles_swapped",
        "parity 52",
        plants.products(plants.in_nibbles),
        "the odd element first",
        detector=nvfp4_forward,
    ),
    quantised_mutant(
        "nibbles_swapped_as_loaded",
        "parity 52",
        plants.on_leaf("weight", lambda codes: codes << 4 | codes >> 4),
        "the odd element first, already in the loader",
        detector=nvfp4_forward_bf16,
    ),
    quantised_mutant(
        "sign_dropped", "parity 52", plants.on_leaf("weight", lambda codes: codes & 0x77), "magnitudes only"
    ),
    quantised_mutant(
        "scale_of_the_neighbour", "parity 53", plants.products(plants.of_the_neighbour), "the scale of the block before"
    ),
    quantised_mutant(
        "scale_of_the_row_above",
        "parity 53",
        plants.on_leaf("weight_scale", lambda scale: np.roll(scale, 1, 0)),
        "the scales of the row before",
        detector=nvfp4_forward,
    ),
    quantised_mutant(
        "scale_of_the_neighbour_in_experts",
        "parity 53",
        plants.products(plants.of_the_neighbour),
        "the scale of the block before, in products of experts",
        EXPERTS,
    ),
    quantised_mutant(
        "scales_swizzled_by_the_loader",
        "parity 53",
        plants.on_leaf("weight_scale", swizzle),
        "scales in a kernel's order, read by rows",
        ALIGNED,
    ),
    quantised_mutant(
        "swizzled_twice",
        "parity 53",
        wrapped("kernels.nvfp4_blackwell:swizzled", lambda once, scale: once(once(scale))),
        "an order that is no involution, applied twice",
        ALIGNED,
        nvfp4_swizzled,
        _TORCH,
    ),
    quantised_mutant(
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
    quantised_mutant(
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
    quantised_mutant(
        "global_scale_reciprocal",
        "parity 54",
        plants.of_layers("multiplier", lambda of_, scale, scheme: 1 / of_(scale, scheme)),
        "the other convention's global scale",
    ),
    quantised_mutant(
        "divisor_multiplied",
        "parity 54",
        plants.of_layers("multiplier", lambda of_, scale, scheme: scale),
        "a divisor of compressed-tensors is multiplied",
        DIVIDING,
    ),
    quantised_mutant(
        "divisor_multiplied_in_experts",
        "parity 54",
        plants.of_layers("multiplier", lambda of_, scale, scheme: scale),
        "a divisor of compressed-tensors is multiplied, in experts",
        DIVIDING_EXPERTS,
    ),
    quantised_mutant(
        "block_of_32", "parity 55", plants.on_leaf("weight_scale", plants.every_other), "one block scale for 32 weights"
    ),
    quantised_mutant(
        "scales_as_e5m2", "parity 56", plants.on_leaf("weight_scale", plants.as_e5m2), "block scales read as e5m2"
    ),
    quantised_mutant(
        "scales_as_e5m2_in_bits",
        "parity 56",
        plants.on_leaf("weight_scale", plants.as_e5m2),
        "block scales read as e5m2",
        detector=nvfp4_weights,
    ),
    quantised_mutant(
        "silent_bfloat16",
        "parity 62",
        wrapped("layers.quantized:NVFP4Linear.project", plants.through_bfloat16),
        "products of weights dequantised to bfloat16",
    ),
    quantised_mutant(
        "fp8_scale_dropped",
        "parity 54",
        wrapped("layers.quantized:FP8Linear.project", lambda run, self, x: run(self, x) / self.weight_scale[...]),
        "codes of an FP8 layer without their scale",
        MIXED,
    ),
]

_FUSED = [
    quantised_mutant(
        "qkv_scales_by_max", "parity 58", plants.shared(_QKV, max), "q, k and v get the largest of their scales"
    ),
    quantised_mutant(
        "qkv_scales_by_min", "parity 58", plants.shared(_QKV, min), "q, k and v get the smallest of their scales"
    ),
    quantised_mutant(
        "qkv_scales_by_last",
        "issue 4",
        plants.shared(_QKV, lambda s: s[-1]),
        "the scale of v, loaded last, wins",
    ),
    quantised_mutant(
        "gate_up_scales_by_max",
        "parity 58",
        plants.shared(_GATE_UP, max),
        "gate and up get the larger scale",
        detector=nvfp4_forward,
    ),
    quantised_mutant("k_scale_doubled", "parity 54", _K_DOUBLED, "a wrong global scale on k alone"),
    quantised_mutant(
        "k_scale_doubled_in_logits",
        "parity 54",
        _K_DOUBLED,
        "a wrong global scale on k alone",
        detector=nvfp4_forward_bf16,
        equivalent="the norm of k divides by any factor on k: logits cannot prove its scale, the layer's output does",
    ),
    quantised_mutant(
        "expert_takes_the_next_ones_scale",
        "parity 24",
        plants.on_leaf("_weight_scale_2", lambda scale: np.roll(scale, -1, 0)),
        "expert i is multiplied by the scale of i + 1",
        EXPERTS,
    ),
    quantised_mutant(
        "up_takes_the_gates_scale",
        "parity 58",
        plants.on_leaf("w13_weight_scale_2", lambda scale: np.repeat(scale[:, :1], 2, 1)),
        "gate and up of an expert share the gate's scale",
        EXPERTS,
    ),
    quantised_mutant(
        "gate_up_order",
        "issue 4",
        plants.loaded(plants.turned_halves),
        "w1 where w3 is: silu on up",
        EXPERTS,
        nvfp4_forward,
    ),
]

NVFP4: list[Mutant] = [*_FORMAT, *_FUSED, *NVFP4_INPUTS, *NVFP4_LOADING, *NVFP4_LIFE]
