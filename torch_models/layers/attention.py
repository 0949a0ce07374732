"""Grouped-query attention with per-head q/k norms, and the cache it appends to."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from torch_models.layers.linear import Linear
from torch_models.layers.norm import RMSNorm
from torch_models.layers.rotary import rotate
from torch_models.layers.step import Entry, LayerCache, Step


def key_value_entries(rows: int, capacity: int, num_kv_heads: int, head_dim: int) -> dict[str, Entry]:
    """What attention keeps: keys (rotated) and values, [B, S, K, H] in the compute dtype."""
    shape = (rows, capacity, num_kv_heads, head_dim)
    return {"key": Entry(shape), "value": Entry(shape)}


def remembered(
    k_BTKH: torch.Tensor, v_BTKH: torch.Tensor, step: Step, cache: LayerCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values so far, [B, S, K, H]; those given are first written into the cache, in place."""
    if cache is None:
        return k_BTKH, v_BTKH
    slots_T = step.start + torch.arange(k_BTKH.shape[1], device=k_BTKH.device)
    cache["key"].index_copy_(1, slots_T, k_BTKH)
    cache["value"].index_copy_(1, slots_T, v_BTKH)
    return cache["key"], cache["value"]


class Attention(nn.Module):
    """softmax(q kᵀ / √H) v over the keys a query may see; scores and softmax in float32.

    Source: transformers ``Qwen3Attention``.
    """

    def __init__(
        self, hidden_size: int, *, num_heads: int, num_kv_heads: int, head_dim: int, eps: float, bias: bool
    ) -> None:
        super().__init__()
        self.q_proj = Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.q_norm = RMSNorm(head_dim, eps=eps)
        self.k_norm = RMSNorm(head_dim, eps=eps)
        self.head_dim = head_dim

    def forward(self, x_BTD: torch.Tensor, step: Step, cache: LayerCache | None = None) -> torch.Tensor:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTNH = rotate(self.q_norm(self.q_proj(x_BTD).view(heads)), step.cos_BTR, step.sin_BTR)
        k_BTKH = rotate(self.k_norm(self.k_proj(x_BTD).view(heads)), step.cos_BTR, step.sin_BTR)
        k_BSKH, v_BSKH = remembered(k_BTKH, self.v_proj(x_BTD).view(heads), step, cache)
        out_BNTH = F.scaled_dot_product_attention(
            q_BTNH.transpose(1, 2),
            k_BSKH.transpose(1, 2),
            v_BSKH.transpose(1, 2),
            attn_mask=step.visible_BTS[:, None],
            enable_gqa=True,
        )
        return self.o_proj(out_BNTH.transpose(1, 2).reshape(*x_BTD.shape[:2], -1))
