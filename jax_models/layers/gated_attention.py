"""Full attention of hybrid models: a query brings a gate for its head's output."""

from __future__ import annotations

import jax
from flax import nnx
from jax.sharding import Mesh

from jax_models.layers.attention import attend_cached, cut_as_kept, remembered
from jax_models.layers.fp8 import cache_scales, fp8_kept
from jax_models.layers.linear import Linear
from jax_models.layers.norm import GemmaRMSNorm
from jax_models.layers.rotary import rotate
from jax_models.layers.step import LayerCache, Step
from jax_models.taps import tap
from loaders.quantization.schemes import KVCache


class GatedAttention(nnx.Module):
    """softmax(q kᵀ / √H) v * sigmoid(gate). ``q_proj`` holds, head by head, a query and its gate.

    Source: transformers ``Qwen3_5Attention``.
    """

    path: str = ""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        bias: bool,
        mesh: Mesh | None,
    ) -> None:
        self.q_proj = Linear(hidden_size, 2 * num_heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.q_norm = GemmaRMSNorm(head_dim, eps=eps)
        self.k_norm = GemmaRMSNorm(head_dim, eps=eps)
        self.head_dim = head_dim
        self.mesh = mesh
        self.kv_cache: KVCache | None = None  # keys and values go through FP8

    def __call__(
        self, x_BTD: jax.Array, step: Step, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        rows = x_BTD.shape[:2]
        qg_BTN2H = tap(self.path, "q_proj", self.q_proj(x_BTD)).reshape(*rows, -1, 2, self.head_dim)
        q_BTNH, gate_BTNH = qg_BTN2H[..., 0, :], qg_BTN2H[..., 1, :]
        k_BTKH = tap(self.path, "k_proj", self.k_proj(x_BTD)).reshape(*rows, -1, self.head_dim)
        v_BTKH = tap(self.path, "v_proj", self.v_proj(x_BTD)).reshape(*rows, -1, self.head_dim)
        q_BTNH = tap(self.path, "q_norm", self.q_norm(q_BTNH))
        q_BTNH = tap(self.path, "q_rotated", rotate(q_BTNH, step.cos_BTR, step.sin_BTR))
        k_BTKH = tap(self.path, "k_norm", self.k_norm(k_BTKH))
        k_BTKH = tap(self.path, "k_rotated", rotate(k_BTKH, step.cos_BTR, step.sin_BTR))
        if self.kv_cache:
            k_scale, v_scale = cache_scales(self.k_proj, self.v_proj, self.kv_cache)
            k_BTKH, v_BTKH = fp8_kept(k_BTKH, k_scale), fp8_kept(v_BTKH, v_scale)
        k_BTKH, v_BTKH = cut_as_kept(k_BTKH, v_BTKH, cache, self.mesh)
        out_BTNH = tap(self.path, "attention", attend_cached(q_BTNH, k_BTKH, v_BTKH, step, cache, self.mesh))
        cache = remembered(k_BTKH, v_BTKH, step, cache)  # not in_turn: on a mesh XLA would gather heads once more
        out_BTNH = tap(self.path, "gated", out_BTNH * jax.nn.sigmoid(gate_BTNH))
        return tap(self.path, "o_proj", self.o_proj(out_BTNH.reshape(*rows, -1))), cache
