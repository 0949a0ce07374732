"""Full attention of hybrid models: a query brings a gate for its head's output."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from loaders.quantization.schemes import KVCache
from loaders.reading.held import Asked
from torch_models.layers.attention import evened, remembered, taken
from torch_models.layers.fp8 import cache_scales, fp8_kept
from torch_models.layers.linear import Linear
from torch_models.layers.norm import GemmaRMSNorm
from torch_models.layers.rotary import rotate
from torch_models.layers.step import LayerCache, Step
from torch_models.taps import tap


class GatedAttention(nn.Module):
    """softmax(q kᵀ / √H) v * sigmoid(gate). ``q_proj`` holds, head by head, a query and its gate.

    Source: transformers ``Qwen3_5Attention``.
    """

    path: str = ""
    asked: Asked | None = None  # on a mesh

    def __init__(
        self, hidden_size: int, *, num_heads: int, num_kv_heads: int, head_dim: int, eps: float, bias: bool
    ) -> None:
        super().__init__()
        self.q_proj = Linear(hidden_size, 2 * num_heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.q_norm = GemmaRMSNorm(head_dim, eps=eps)
        self.k_norm = GemmaRMSNorm(head_dim, eps=eps)
        self.head_dim = head_dim
        self.kv_cache: KVCache | None = None  # keys and values go through FP8

    def hold(self, asked: Asked) -> None:
        """On a mesh: keep of keys and values those alone that the query heads here ask for."""
        self.asked = asked

    def forward(self, x_BTD: torch.Tensor, step: Step, cache: LayerCache | None = None) -> torch.Tensor:
        rows = x_BTD.shape[:2]
        qg_BTN2H = tap(self.path, "q_proj", self.q_proj(x_BTD)).view(*rows, -1, 2, self.head_dim)
        q_BTNH, gate_BTNH = qg_BTN2H.unbind(-2)
        k_BTKH = taken(tap(self.path, "k_proj", self.k_proj(x_BTD)).view(*rows, -1, self.head_dim), self.asked)
        v_BTKH = taken(tap(self.path, "v_proj", self.v_proj(x_BTD)).view(*rows, -1, self.head_dim), self.asked)
        q_BTNH = tap(self.path, "q_norm", self.q_norm(q_BTNH))
        q_BTNH = tap(self.path, "q_rotated", rotate(q_BTNH, step.cos_BTR, step.sin_BTR))
        k_BTKH = tap(self.path, "k_norm", self.k_norm(k_BTKH))
        k_BTKH = tap(self.path, "k_rotated", rotate(k_BTKH, step.cos_BTR, step.sin_BTR))
        if self.kv_cache:
            k_scale, v_scale = cache_scales(self.k_proj, self.v_proj, self.kv_cache)
            k_BTKH, v_BTKH = fp8_kept(k_BTKH, k_scale), fp8_kept(v_BTKH, v_scale)
        k_BSKH, v_BSKH = remembered(k_BTKH, v_BTKH, step, cache)
        out_BNTH = F.scaled_dot_product_attention(
            q_BTNH.transpose(1, 2),
            evened(k_BSKH, self.asked).transpose(1, 2),
            evened(v_BSKH, self.asked).transpose(1, 2),
            attn_mask=step.visible_BTS[:, None],
            enable_gqa=True,
        )
        out_BTNH = tap(self.path, "attention", out_BNTH.transpose(1, 2))
        out_BTNH = tap(self.path, "gated", out_BTNH * torch.sigmoid(gate_BTNH))
        return tap(self.path, "o_proj", self.o_proj(out_BTNH.reshape(*rows, -1)))
