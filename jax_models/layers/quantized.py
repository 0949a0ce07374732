"""Linear layers whose weight is stored quantised, under the checkpoint's own names. Twin of the torch file.

Sources (law 4) are the checkpoint's codes and scales, and nothing else is kept: ``alpha``, what a product of codes and
block scales is multiplied by, is computed from them inside the program, so there is nothing to go stale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import jax
import jax.numpy as jnp
from flax import nnx

from jax_models.kernels.activations import divided, quantized_activations
from jax_models.kernels.nvfp4 import dequantized
from jax_models.layers.fp8 import fp8_rounded
from jax_models.layers.linear import Linear
from jax_models.layers.products import Cuts, matmul
from loaders.quantization.schemes import BLOCK, Scheme


def multiplier(scale: jax.Array, scheme: Scheme) -> jax.Array:
    """A global scale as what codes are multiplied by, whatever the spelling."""
    return 1.0 / scale if scheme.divides else scale


class QuantizedLinear(nnx.Module, ABC):
    """y = x Wᵀ + b with W in codes, in the place of ``plain``; summed in float32, then returned in the dtype of x."""

    def __init__(self, plain: Linear) -> None:
        self.in_features, self.out_features, self.has_bias = plain.in_features, plain.out_features, plain.has_bias
        if plain.has_bias:
            self.bias = nnx.Param(jnp.zeros((self.out_features,)))

    @abstractmethod
    def dequantized(self) -> jax.Array:
        """The weight, float32 [N, K], with the roundings of the exporter's own definition."""

    @abstractmethod
    def project(self, x: jax.Array) -> jax.Array:
        """x Wᵀ, float32: what a head is asked for."""

    def __call__(self, x: jax.Array) -> jax.Array:
        y32 = self.project(x)
        if self.has_bias:
            y32 = y32 + self.bias[...].astype(x.dtype).astype(jnp.float32)
        return y32.astype(x.dtype)


class NVFP4Linear(QuantizedLinear):
    """A linear layer with W in 4-bit codes, a scale for every 16 of a row, and one for all of it.

    Attributes:
        cuts: how the weight lies on a mesh.
        quantizes_inputs: x is rounded to codes first, as the checkpoint says; False runs the weights only.
    """

    def __init__(self, plain: Linear, scheme: Scheme, cuts: Cuts, *, quantizes_inputs: bool) -> None:
        super().__init__(plain)
        leaves, scalar = scheme.leaves, (1,) if scheme.divides else ()
        setattr(self, leaves["codes"], nnx.Param(jnp.zeros((self.out_features, self.in_features // 2), jnp.uint8)))
        blocks = (self.out_features, self.in_features // BLOCK)
        setattr(self, leaves["block"], nnx.Param(jnp.zeros(blocks, jnp.float8_e4m3fn)))
        setattr(self, leaves["global"], nnx.Param(jnp.zeros(scalar)))
        if scheme.activations:
            setattr(self, leaves["input"], nnx.Param(jnp.zeros(scalar)))
        self.scheme, self.cuts = scheme, cuts
        self.quantizes_inputs = scheme.activations and quantizes_inputs

    def source(self, role: str) -> jax.Array:
        """A tensor of the checkpoint: ``codes``, ``block``, ``global`` or ``input``."""
        return getattr(self, self.scheme.leaves[role])[...]

    def dequantized(self) -> jax.Array:
        """The weight, float32 [N, K], with the roundings of the exporter's own definition."""
        return exact_weight(self.source("codes"), self.source("block"), self.source("global").reshape(()), self.scheme)

    def project(self, x: jax.Array) -> jax.Array:
        """x Wᵀ, float32: what a head is asked for."""
        alpha = multiplier(self.source("global"), self.scheme).reshape(())
        if self.quantizes_inputs:
            input_scale = multiplier(self.source("input"), self.scheme).reshape(())
            x, alpha = quantized_activations(x, input_scale), alpha * input_scale
        return matmul(x, self.source("codes"), self.source("block"), self.cuts) * alpha


class FP8Linear(QuantizedLinear):
    """A linear layer with W in e4m3 and one scale for all of it.

    Source: modelopt's ``FP8``: weight = codes * ``weight_scale``; inputs, likewise, by ``input_scale``.
    """

    def __init__(self, plain: Linear, scheme: Scheme, *, quantizes_inputs: bool) -> None:
        super().__init__(plain)
        self.weight = nnx.Param(jnp.zeros((self.out_features, self.in_features), jnp.float8_e4m3fn))
        self.weight_scale = nnx.Param(jnp.zeros(()))
        if scheme.activations:
            self.input_scale = nnx.Param(jnp.zeros(()))
        self.quantizes_inputs = scheme.activations and quantizes_inputs

    def dequantized(self) -> jax.Array:
        """The weight, float32 [N, K]."""
        return self.weight[...].astype(jnp.float32) * self.weight_scale[...]

    def project(self, x: jax.Array) -> jax.Array:
        """x Wᵀ, float32: what a head is asked for."""
        alpha = self.weight_scale[...]
        if self.quantizes_inputs:
            x, alpha = fp8_rounded(x, self.input_scale[...]), alpha * self.input_scale[...]
        weight = self.weight[...].astype(x.dtype)  # exact, also in bfloat16
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=jnp.float32) * alpha


def exact_weight(codes: jax.Array, block: jax.Array, scale: jax.Array, scheme: Scheme) -> jax.Array:
    """Codes [..., N, K/2] expanded to float32 [..., N, K], with the roundings of the exporter's own definition."""
    numbers = dequantized(codes, jnp.ones_like(block), jnp.float32)
    block32 = block.astype(jnp.float32)
    by = divided(block32, scale) if scheme.divides else block32 * scale
    if not scheme.divides:
        numbers = jnp.where(numbers == 0, 0.0, numbers)  # modelopt reads the code of -0 as 0
    return (numbers.reshape(*by.shape, BLOCK) * by[..., None]).reshape(numbers.shape)
