"""Grouped-query attention with per-head q/k norms, and the cache it appends to."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from loaders.quantization.schemes import KVCache
from loaders.reading.held import Asked
from torch_models.layers.fp8 import cache_scales, fp8_kept
from torch_models.layers.linear import Linear
from torch_models.layers.norm import GemmaRMSNorm, RMSNorm
from torch_models.layers.rotary import rotate
from torch_models.layers.step import Entry, LayerCache, Step
from torch_models.taps import tap


def key_value_entries(rows: int, capacity: int, num_kv_heads: int, head_dim: int) -> dict[str, Entry]:
    """What attention keeps: keys (rotated) and values, [B, K, S, H] in the compute dtype.

    Heads come before slots, so that what a head reads lies together.
    """
    shape, axes = (rows, num_kv_heads, capacity, head_dim), ("B", "KH", "S", "H")
    return {"key": Entry(shape, axes), "value": Entry(shape, axes)}


def taken(x_BTKH: torch.Tensor, asked: Asked | None) -> torch.Tensor:
    """Of keys or values those that the queries here ask for; None: all."""
    return x_BTKH if asked is None else x_BTKH[:, :, asked.heads]


def evened(x_BSKH: torch.Tensor, asked: Asked | None) -> torch.Tensor:
    """Keys or values as ``attend`` takes them, each for as many queries: where they are not, a copy for each query."""
    if asked is None or asked.is_even:
        return x_BSKH
    heads = zip(x_BSKH.split(1, dim=2), asked.queries, strict=True)
    return torch.cat([head_BS1H.expand(-1, -1, times, -1) for head_BS1H, times in heads], dim=2)


def remembered(
    k_BTKH: torch.Tensor, v_BTKH: torch.Tensor, step: Step, cache: LayerCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values so far, [B, S, K, H]; those given are first written into the cache, in place."""
    if cache is None:
        return k_BTKH, v_BTKH
    cache["key"].index_copy_(2, step.slots, k_BTKH.transpose(1, 2))
    cache["value"].index_copy_(2, step.slots, v_BTKH.transpose(1, 2))
    return cache["key"].transpose(1, 2), cache["value"].transpose(1, 2)


def attend(
    q_BTNH: torch.Tensor,
    k_BSKH: torch.Tensor,
    v_BSKH: torch.Tensor,
    visible_BTS: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """softmax(scale · q kᵀ) v over the keys a query may see, [B, T, N, H]; scores and softmax in float32.

    Args:
        q_BTNH: queries.
        k_BSKH: keys, each for N/K query heads.
        v_BSKH: values.
        visible_BTS: bool, which keys each query may see.
        scale: None: 1 / √H.
        softcap: scores are squeezed into ±softcap before the mask, softcap · tanh(score / softcap); None: they are not.
    """
    if softcap is None:
        k_BKSH, v_BKSH, visible_B1TS = k_BSKH.transpose(1, 2), v_BSKH.transpose(1, 2), visible_BTS[:, None]
        if q_BTNH.shape[1] == 1:  # heads of a group stand where tokens would, so that their keys are read once
            q_BKGH = q_BTNH.reshape(len(q_BTNH), k_BKSH.shape[1], -1, q_BTNH.shape[3])
            out_BKGH = F.scaled_dot_product_attention(q_BKGH, k_BKSH, v_BKSH, attn_mask=visible_B1TS, scale=scale)
            return out_BKGH.reshape(q_BTNH.shape)
        options = {"attn_mask": visible_B1TS, "scale": scale, "enable_gqa": True}
        return F.scaled_dot_product_attention(q_BTNH.transpose(1, 2), k_BKSH, v_BKSH, **options).transpose(1, 2)
    q_BTKGH = q_BTNH.unflatten(2, (k_BSKH.shape[2], -1))
    scores_BKGTS = torch.einsum("btkgh,bskh->bkgts", q_BTKGH.float(), k_BSKH.float())
    scores_BKGTS = scores_BKGTS * (q_BTNH.shape[3] ** -0.5 if scale is None else scale)
    scores_BKGTS = torch.tanh(scores_BKGTS / softcap) * softcap
    scores_BKGTS = scores_BKGTS.masked_fill(~visible_BTS[:, None, None], torch.finfo(torch.float32).min)
    weight_BKGTS = scores_BKGTS.softmax(-1).to(v_BSKH.dtype)
    return torch.einsum("bkgts,bskh->btkgh", weight_BKGTS, v_BSKH).flatten(2, 3)


class Attention(nn.Module):
    """Softmax attention with norms of q and k before they are rotated. Source: transformers ``Qwen3Attention``.

    Args:
        hidden_size: D.
        num_heads: N.
        num_kv_heads: K.
        head_dim: H.
        eps: of the norms.
        bias: every projection has one.
        norm: what q and k are normed by.
        scale: see ``attend``.
        softcap: see ``attend``.
    """

    path: str = ""
    asked: Asked | None = None  # on a mesh

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
        bias: bool,
        norm: type[RMSNorm] | type[GemmaRMSNorm] = RMSNorm,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.q_proj = Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.q_norm = norm(head_dim, eps=eps)
        self.k_norm = norm(head_dim, eps=eps)
        self.head_dim = head_dim
        self.scale = scale
        self.softcap = softcap
        self.kv_cache: KVCache | None = None  # keys and values go through FP8

    def hold(self, asked: Asked) -> None:
        """On a mesh: keep of keys and values those alone that the query heads here ask for."""
        self.asked = asked

    def forward(self, x_BTD: torch.Tensor, step: Step, cache: LayerCache | None = None) -> torch.Tensor:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTNH = tap(self.path, "q_proj", self.q_proj(x_BTD)).view(heads)
        k_BTKH = taken(tap(self.path, "k_proj", self.k_proj(x_BTD)).view(heads), self.asked)
        v_BTKH = taken(tap(self.path, "v_proj", self.v_proj(x_BTD)).view(heads), self.asked)
        q_BTNH = tap(self.path, "q_norm", self.q_norm(q_BTNH))
        q_BTNH = tap(self.path, "q_rotated", rotate(q_BTNH, step.cos_BTR, step.sin_BTR))
        k_BTKH = tap(self.path, "k_norm", self.k_norm(k_BTKH))
        k_BTKH = tap(self.path, "k_rotated", rotate(k_BTKH, step.cos_BTR, step.sin_BTR))
        if self.kv_cache:
            k_scale, v_scale = cache_scales(self.k_proj, self.v_proj, self.kv_cache)
            k_BTKH, v_BTKH = fp8_kept(k_BTKH, k_scale), fp8_kept(v_BTKH, v_scale)
        k_BSKH, v_BSKH = remembered(k_BTKH, v_BTKH, step, cache)
        keys_values = evened(k_BSKH, self.asked), evened(v_BSKH, self.asked)
        out_BTNH = attend(q_BTNH, *keys_values, step.visible_BTS, scale=self.scale, softcap=self.softcap)
        out_BTNH = tap(self.path, "attention", out_BTNH)
        return tap(self.path, "o_proj", self.o_proj(out_BTNH.reshape(*x_BTD.shape[:2], -1)))
