"""NVFP4 products in plain torch, on any device: what the kernels are held against, and what runs where there is none.

A weight [N, K] is ``packed`` uint8 [N, K/2], two e2m1 codes a byte with the even element in the low bits, and ``scale``
e4m3 [N, K/16], one for 16 elements along K. Global scales are float32 and multiply the product: they never enter the
weight, so that weights of one product may have several. Nothing here holds a tensor between calls or, but for
``expert_matmul`` of many rows, asks the host anything, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch

from loaders.quantization.schemes import BLOCK

PIECE = 1 << 24  # elements of a weight that are expanded at once: 64 MiB in float32
E2M1_MAX, E4M3_MAX, E4M3_MIN = 6.0, 448.0, 2.0**-9
# midpoints of the e2m1 magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6; one that ties goes to the even code, under or over it
TIES_DOWN, TIES_UP = (0.25, 1.25, 2.5, 5.0), (0.75, 1.75, 3.5)


def dequantized(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight without its global scale, e2m1 times e4m3: at most 6 significant bits, so exact in bfloat16.

    Args:
        packed: uint8 [..., N, K/2].
        scale: e4m3 [..., N, K/16].
        dtype: bfloat16 or float32.
    Returns:
        dtype [..., N, K].
    """
    # a pair of numbers for every byte, computed here: a table of the host's could not be captured in a graph
    bytes_ = torch.arange(256, dtype=torch.uint8, device=packed.device)
    pairs = _numbers(torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1), dtype)
    pairs = pairs.view({2: torch.int32, 4: torch.int64}[dtype.itemsize]).flatten()  # both at once: twice as fast
    numbers = pairs.index_select(0, packed.flatten().int()).view(dtype)
    return _scaled(numbers.view(*packed.shape[:-1], -1), scale)


def matmul(x_UK: torch.Tensor, packed_NJ: torch.Tensor, scale_NQ: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """alpha (x Wᵀ), with products and sums in float32, where bfloat16 operands multiply exactly.

    Args:
        x_UK: bfloat16 or float32 [U, K].
        packed_NJ: uint8 [N, K/2].
        scale_NQ: e4m3 [N, K/16].
        alpha: float32 [] or [N].
    Returns:
        float32 [U, N].
    """
    x_UK = x_UK.float()
    rows = max(1, PIECE // x_UK.shape[1])
    pieces = [
        x_UK @ dequantized(packed_PJ, scale_PQ, torch.float32).T
        for packed_PJ, scale_PQ in zip(packed_NJ.split(rows), scale_NQ.split(rows), strict=True)
    ]
    return torch.cat(pieces, dim=1) * alpha


def expert_matmul(
    x_AK: torch.Tensor,
    packed_ENJ: torch.Tensor,
    scale_ENQ: torch.Tensor,
    alpha_ES: torch.Tensor,
    experts_A: torch.Tensor,
    *,
    ask_host: bool = True,
) -> torch.Tensor:
    """Every row times the weight of its own expert.

    No more rows than experts take copies of their experts' weights, a few at a time; more of them ask the host which
    experts were hit, and expand each once.

    Args:
        x_AK: bfloat16 or float32 [A, K].
        packed_ENJ: uint8 [E, N, K/2].
        scale_ENQ: e4m3 [E, N, K/16].
        alpha_ES: float32 [E, S]; expert e multiplies the s-th of S equal runs of its N rows by alpha[e, s].
        experts_A: int64 [A], from 0 to E - 1.
        ask_host: False takes copies however many rows there are, for steps that are captured.
    Returns:
        float32 [A, N].
    """
    if ask_host and len(x_AK) > len(packed_ENJ):
        out_AN = _of_hit(x_AK.float(), packed_ENJ, scale_ENQ, experts_A)
    else:
        out_AN = _of_copies(x_AK.float(), packed_ENJ, scale_ENQ, experts_A)
    alpha_AS = alpha_ES.index_select(0, experts_A)
    return (out_AN.unflatten(1, (alpha_ES.shape[1], -1)) * alpha_AS[..., None]).flatten(1)


def quantized_activations(x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """The values that an FP4 product sees in place of x, without ``input_scale``: that belongs in alpha.

    Args:
        x: bfloat16 or float32 [..., K].
        input_scale: float32 [].
    Returns:
        dtype of x [..., K], exact.
    """
    codes, scale = activation_codes(x, input_scale)
    return _scaled(_numbers(codes, x.dtype), scale)


def activation_codes(x: torch.Tensor, input_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations in e2m1 with a scale for every 16: the weights' own arithmetic, in float32.

    The scale is the block's amax / (6 input_scale) rounded to e4m3, 1 for a block of zeros. Codes are the nearest, ties
    to the even one, and 6 beyond it; the sign is that of the quotient, so -0 becomes 0.

    Args:
        x: bfloat16 or float32 [..., K].
        input_scale: float32 [].
    Returns:
        codes: uint8 [..., K], one a byte.
        scale: e4m3 [..., K/16].
    Source: modelopt ``NVFP4QTensor.quantize``; the same bits in tests/torch_models/test_nvfp4_reference.py.
    """
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1) / (E2M1_MAX * input_scale)
    scale = torch.where(scale == 0, 1.0, scale).clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)
    quotient = blocks / (scale.float() * input_scale)[..., None]
    return _nearest_codes(quotient).flatten(-2), scale


def packed_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K], one code a byte, as [..., K/2], two a byte with the even element in the low bits."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def _numbers(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # e2m1's bits are also e4m3's of 1/64 the value, subnormals too
    return ((codes & 7) << 2 | (codes & 8) << 4).view(torch.float8_e4m3fn).to(dtype) * 64


def _scaled(numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Numbers [..., K], each times its block's scale."""
    return (numbers.unflatten(-1, (-1, BLOCK)) * scale.to(numbers.dtype)[..., None]).flatten(-2)


def _nearest_codes(quotient: torch.Tensor) -> torch.Tensor:
    size, codes = quotient.abs(), (quotient < 0).to(torch.uint8) << 3
    for bound in TIES_DOWN:
        codes += ~(size <= bound)  # negated, so that a NaN has modelopt's code, 7
    for bound in TIES_UP:
        codes += ~(size < bound)
    return codes


def _of_copies(
    x_AK: torch.Tensor, packed_ENJ: torch.Tensor, scale_ENQ: torch.Tensor, experts_A: torch.Tensor
) -> torch.Tensor:
    rows = max(1, PIECE // (packed_ENJ.shape[1] * x_AK.shape[1]))
    pieces = []
    for x_PK, experts_P in zip(x_AK.split(rows), experts_A.split(rows), strict=True):
        packed_PNJ = packed_ENJ.index_select(0, experts_P)
        scale_PNQ = scale_ENQ.view(torch.uint8).index_select(0, experts_P).view(scale_ENQ.dtype)
        pieces.append(torch.bmm(dequantized(packed_PNJ, scale_PNQ, torch.float32), x_PK[..., None])[..., 0])
    return torch.cat(pieces)


def _of_hit(
    x_AK: torch.Tensor, packed_ENJ: torch.Tensor, scale_ENQ: torch.Tensor, experts_A: torch.Tensor
) -> torch.Tensor:
    out_AN = x_AK.new_empty(len(x_AK), packed_ENJ.shape[1])  # every row is written once
    for expert in experts_A.unique().tolist():
        (rows_H,) = (experts_A == expert).nonzero(as_tuple=True)
        out_AN[rows_H] = x_AK[rows_H] @ dequantized(packed_ENJ[expert], scale_ENQ[expert], torch.float32).T
    return out_AN
