"""Linear layers whose weight is stored quantised, under the checkpoint's own names. Twin of the JAX file.

Sources (law 4) are the checkpoint's codes and scales and stay as they were loaded. Derived from them: ``alpha``, what
a product of codes and block scales is multiplied by; with quantised inputs ``input_scale_inv``; and, for kernels that
want it so, ``weight_scale_interleaved``, which takes the storage of the block scales when it is as large. Scalars are
derived where they are used, so that whoever writes to their sources, by whatever way, cannot leave them stale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.nn import functional as F

from loaders.quantization.schemes import BLOCK, Scheme
from torch_models.derived import alias_or_bind_derived_param, holds_derived, is_derived
from torch_models.kernels import nvfp4_blackwell
from torch_models.kernels.choice import Kernel
from torch_models.kernels.nvfp4_reference import activation_codes, dequantized, packed_codes, quantized_activations
from torch_models.layers.fp8 import fp8_rounded
from torch_models.layers.linear import Join, Linear, empty_param


def multiplier(scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """A global scale as what codes are multiplied by, whatever the spelling."""
    return 1.0 / scale if scheme.divides else scale


class QuantizedLinear(nn.Module, ABC):
    """y = x Wᵀ + b with W in codes, in the place of ``plain``; summed in float32, then returned in the dtype of x."""

    summed: Join | None = None  # on a mesh, where inputs are cut
    gathered: Join | None = None  # of a head, where outputs are

    def __init__(self, plain: Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.has_bias = plain.in_features, plain.out_features, plain.has_bias
        if plain.has_bias:
            self.bias = empty_param(self.out_features)

    @abstractmethod
    def dequantized(self) -> torch.Tensor:
        """The weight, float32 [N, K], with the roundings of the exporter's own definition."""

    @abstractmethod
    def project(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ, float32: what a head is asked for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y32 = self.project(x)
        if self.has_bias:
            y32 = y32 + self.bias.to(x.dtype).float()
        return y32.to(x.dtype)

    def _joined(self, y32: torch.Tensor) -> torch.Tensor:
        """On a mesh all of a product, where this layer has parts of its sums or, as a head, some of its outputs."""
        y32 = y32 if self.summed is None else self.summed(y32)
        return y32 if self.gathered is None else self.gathered(y32)


class NVFP4Linear(QuantizedLinear):
    """A linear layer with W in 4-bit codes, a scale for every 16 of a row, and one for all of it.

    Attributes:
        kernel: what computes the product.
        quantizes_inputs: x is rounded to codes first, as the checkpoint says; False runs the weights only.
    """

    alpha: torch.Tensor
    input_scale_inv: torch.Tensor
    weight_scale_interleaved: torch.Tensor

    def __init__(self, plain: Linear, scheme: Scheme, kernel: Kernel, *, quantizes_inputs: bool) -> None:
        super().__init__(plain)
        leaves, scalar = scheme.leaves, (1,) if scheme.divides else ()
        setattr(self, leaves["codes"], empty_param(self.out_features, self.in_features // 2))
        setattr(self, leaves["block"], empty_param(self.out_features, self.in_features // BLOCK))
        setattr(self, leaves["global"], empty_param(*scalar))
        if scheme.activations:
            setattr(self, leaves["input"], empty_param(*scalar))
        self.scheme, self.kernel = scheme, kernel
        self.quantizes_inputs = scheme.activations and quantizes_inputs
        for name in ("alpha", "input_scale_inv") if self.quantizes_inputs else ("alpha",):
            self.register_buffer(name, torch.empty((), dtype=torch.float32, device="meta"), persistent=False)

    def source(self, role: str) -> torch.Tensor:
        """A tensor of the checkpoint as it was loaded: ``codes``, ``block``, ``global`` or ``input``."""
        return as_loaded(self, self.scheme.leaves[role])

    @torch.no_grad()
    def derive(self) -> None:
        """Compute alpha and its like anew, and bring block scales into the kernel's order if they are not in it."""
        self._derive_scalars()
        block = self.scheme.leaves["block"]
        if self.kernel.swizzles and not is_derived(self, block):
            swizzled = nvfp4_blackwell.swizzled(self.get_parameter(block))
            alias_or_bind_derived_param(self, block, "weight_scale_interleaved", swizzled)

    def dequantized(self) -> torch.Tensor:
        """The weight, float32 [N, K], with the roundings of the exporter's own definition."""
        return exact_weight(self.source("codes"), self.source("block"), self.source("global").view(()), self.scheme)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ, float32: what a head is asked for."""
        self._derive_scalars()
        return self._joined(self._product(x.flatten(0, -2)).view(*x.shape[:-1], -1))

    @torch.no_grad()
    def _derive_scalars(self) -> None:
        alpha = multiplier(self.source("global"), self.scheme).view(())
        if self.quantizes_inputs:
            self.input_scale_inv.copy_(1.0 / self._input_scale())
            alpha = alpha * self._input_scale()
        self.alpha.copy_(alpha)

    def _input_scale(self) -> torch.Tensor:
        return multiplier(self.source("input"), self.scheme).view(())

    def _product(self, x_UK: torch.Tensor) -> torch.Tensor:
        codes = self.source("codes")
        if self.quantizes_inputs and self.kernel.is_native:
            x_codes, x_scale = activation_codes(x_UK, self._input_scale())
            given = (packed_codes(x_codes), nvfp4_blackwell.swizzled(x_scale), codes, self.weight_scale_interleaved)
            return nvfp4_blackwell.matmul(*given, self.alpha)
        if self.quantizes_inputs:
            x_UK = quantized_activations(x_UK, self._input_scale())
        return self.kernel.matmul(x_UK, codes, self._block_scales(), self.alpha)

    def _block_scales(self) -> torch.Tensor:
        if not self.kernel.swizzles:
            return self.source("block")
        shape = self.get_parameter(self.scheme.leaves["block"]).shape
        return nvfp4_blackwell.unswizzled(self.weight_scale_interleaved, tuple(shape))


class FP8Linear(QuantizedLinear):
    """A linear layer with W in e4m3 and one scale for all of it.

    Source: modelopt's ``FP8``: weight = codes * ``weight_scale``; inputs, likewise, by ``input_scale``.
    """

    def __init__(self, plain: Linear, scheme: Scheme, *, quantizes_inputs: bool) -> None:
        super().__init__(plain)
        self.weight = empty_param(self.out_features, self.in_features)
        self.weight_scale = empty_param()
        if scheme.activations:
            self.input_scale = empty_param()
        self.quantizes_inputs = scheme.activations and quantizes_inputs

    def dequantized(self) -> torch.Tensor:
        """The weight, float32 [N, K]."""
        return self.weight.float() * self.weight_scale

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """x Wᵀ, float32: what a head is asked for."""
        alpha = self.weight_scale
        if self.quantizes_inputs:
            x, alpha = fp8_rounded(x, self.input_scale), alpha * self.input_scale
        y32 = F.linear(x.float(), self.weight.float()) * alpha if x.is_cpu else self._on_device(x, alpha)
        return self._joined(y32)

    def _on_device(self, x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        """e4m3 is exact in the dtype of x; only the product is rounded to it before alpha."""
        return F.linear(x, self.weight.to(x.dtype)).float() * alpha


def as_loaded(layer: nn.Module, leaf: str) -> torch.Tensor:
    """A parameter's values as the checkpoint has them, whatever order the storage of block scales holds.

    Raises:
        RuntimeError: it holds some of both: block scales were written in part.
    """
    held = layer.get_parameter(leaf)
    return nvfp4_blackwell.unswizzled(held, tuple(held.shape)) if holds_derived(layer, leaf) else held


def exact_weight(codes: torch.Tensor, block: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Codes [..., N, K/2] expanded to float32 [..., N, K], with the roundings of the exporter's own definition."""
    numbers = dequantized(codes, torch.ones_like(block), torch.float32)
    by = block.float() / scale if scheme.divides else block.float() * scale
    if not scheme.divides:
        numbers = numbers + 0.0  # modelopt reads the code of -0 as 0
    return (numbers.unflatten(-1, (-1, BLOCK)) * by[..., None]).flatten(-2)
