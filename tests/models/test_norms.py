"""The norms of both backends against their formulas in float64; and what is rounded when."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import jax_models.layers.norm
import torch_models.layers.norm

EPS = 1e-6
BF16 = ml_dtypes.bfloat16


class Norm:
    """One norm of one backend, called with NumPy arrays; bfloat16 in, bfloat16 out."""

    def __init__(self, backend: str, name: str, weight: np.ndarray) -> None:
        self.is_torch = backend == "torch"
        module = torch_models.layers.norm if self.is_torch else jax_models.layers.norm
        self.norm = vars(module)[name](len(weight), eps=EPS)
        if self.is_torch:
            self.norm.weight = nn.Parameter(self.array(weight), requires_grad=False)
            for buffer, value in self.norm.named_buffers():
                setattr(self.norm, buffer, torch.empty_like(value, device="cpu"))
        else:
            self.norm.weight = nnx.Param(self.array(weight))

    def array(self, x: np.ndarray):
        if not self.is_torch:
            return jnp.asarray(x)
        return torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16 if x.dtype == BF16 else torch.float32)

    def numpy(self, x) -> np.ndarray:
        return x.float().numpy() if self.is_torch else np.asarray(x, np.float32)

    def __call__(self, *xs: np.ndarray) -> np.ndarray:
        return self.numpy(self.norm(*map(self.array, xs)))

    def add_norm(self, x: np.ndarray, residual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        normed, total = self.norm.add_norm(self.array(x), self.array(residual))
        return self.numpy(normed), self.numpy(total)


def rms(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + EPS)


def drawn(dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, other = (rng.standard_normal((2, 5, 24)) * 3 for _ in range(2))
    x[0, 0] *= 1e-3  # where eps shows
    return x.astype(dtype), other.astype(dtype), (0.3 * rng.standard_normal(24)).astype(dtype)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_plain_norm_multiplies_by_its_weight(backend):
    x, _, weight = drawn(np.float32)
    expected = rms(x) * weight.astype(np.float64)
    np.testing.assert_allclose(Norm(backend, "RMSNorm", weight)(x), expected, rtol=2e-6)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_gemma_norm_multiplies_by_one_and_its_weight(backend):
    x, _, weight = drawn(np.float32)
    expected = rms(x) * (1 + weight.astype(np.float64))
    np.testing.assert_allclose(Norm(backend, "GemmaRMSNorm", weight)(x), expected, rtol=2e-6)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_in_bfloat16_it_is_rounded_once_at_the_end(backend):
    x, _, weight = drawn(BF16)
    exact = rms(x) * (1 + weight.astype(np.float64))
    found = Norm(backend, "GemmaRMSNorm", weight)(x)
    step = np.abs(exact) * 2.0**-8  # half a unit in the last place, at most
    assert (np.abs(found - exact) <= step * 1.001).all()
    twice = ((1 + weight.astype(np.float64)).astype(BF16).astype(np.float64) * rms(x)).astype(BF16)
    assert (found != twice.astype(np.float32)).any()  # 1 + w in the weight's own dtype would show


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_fused_sum_is_rounded_before_it_is_normed(backend):
    x, residual, weight = drawn(BF16)
    norm = Norm(backend, "GemmaRMSNorm", weight)
    normed, total = norm.add_norm(x, residual)
    rounded = (x.astype(np.float32) + residual.astype(np.float32)).astype(BF16)
    np.testing.assert_array_equal(total, rounded.astype(np.float32))
    np.testing.assert_array_equal(normed, norm(rounded))


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_gated_norm_has_a_plain_weight_and_norms_before_the_gate(backend):
    x, gate, weight = drawn(np.float32)
    silu = gate / (1 + np.exp(-gate.astype(np.float64)))
    expected = weight.astype(np.float64) * rms(x) * silu
    np.testing.assert_allclose(Norm(backend, "RMSNormGated", weight)(x, gate), expected, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("is_fused", [False, True], ids=["norm", "sum and norm"])
def test_a_gradient_goes_to_the_weight_itself_run_after_run(is_fused):
    """What is derived from the weight is written anew by every run, and takes part in none that is differentiated."""
    x, residual, weight = (torch.from_numpy(array) for array in drawn(np.float32))
    norm = Norm("torch", "GemmaRMSNorm", weight.numpy()).norm
    norm.weight.requires_grad_(True)
    given = (x + residual).requires_grad_(True)
    runs = [norm.add_norm(x, residual)[0] if is_fused else norm(given) for _ in range(2)]
    torch.stack(runs).sum().backward()
    expected = 2 * rms((x + residual).numpy()).sum(axis=(0, 1))
    np.testing.assert_allclose(norm.weight.grad.numpy(), expected, rtol=1e-5, atol=1e-5)
