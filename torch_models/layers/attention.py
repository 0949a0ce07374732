"""Grouped-query attention with per-head q/k norms, and the cache it appends to."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import nn
from torch.nn import functional as F

from torch_models.layers.linear import Linear
from torch_models.layers.norm import RMSNorm
from torch_models.layers.rotary import rotate


class LayerCache(TypedDict):
    """Keys (rotated) and values of one layer, [B, S, K, H] in the compute dtype."""

    key: torch.Tensor
    value: torch.Tensor


def visible(key_mask_BS: torch.Tensor, start: int, length: int, window: int | None) -> torch.Tensor:
    """Which keys each of ``length`` queries from slot ``start`` on may see, bool [B, T, S].

    Real keys not after the query, at most ``window`` of them with itself; and always itself, so that a padded query has
    something to average and stays finite.
    """
    query_T1 = start + torch.arange(length, device=key_mask_BS.device)[:, None]
    key_1S = torch.arange(key_mask_BS.shape[1], device=key_mask_BS.device)[None, :]
    causal_TS = key_1S <= query_T1
    if window is not None:
        causal_TS = causal_TS & (key_1S > query_T1 - window)
    return (causal_TS[None] & key_mask_BS[:, None, :]) | (key_1S == query_T1)[None]


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

    def forward(
        self,
        x_BTD: torch.Tensor,
        cos_BTR: torch.Tensor,
        sin_BTR: torch.Tensor,
        visible_BTS: torch.Tensor,
        cache: LayerCache | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTNH = rotate(self.q_norm(self.q_proj(x_BTD).view(heads)), cos_BTR, sin_BTR)
        k_BSKH = rotate(self.k_norm(self.k_proj(x_BTD).view(heads)), cos_BTR, sin_BTR)
        v_BSKH = self.v_proj(x_BTD).view(heads)
        if cache is not None:
            end = start + x_BTD.shape[1]
            cache["key"][:, start:end] = k_BSKH
            cache["value"][:, start:end] = v_BSKH
            k_BSKH, v_BSKH = cache["key"][:, :end], cache["value"][:, :end]
        out_BNTH = F.scaled_dot_product_attention(
            q_BTNH.transpose(1, 2),
            k_BSKH.transpose(1, 2),
            v_BSKH.transpose(1, 2),
            attn_mask=visible_BTS[:, None],
            enable_gqa=True,
        )
        return self.o_proj(out_BNTH.transpose(1, 2).reshape(*x_BTD.shape[:2], -1))
