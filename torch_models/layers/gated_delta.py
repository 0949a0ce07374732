"""Gated delta net: linear attention whose state forgets by a gate and learns by the delta rule.

Source: arXiv:2412.06464; transformers ``Qwen3_5GatedDeltaNet``. Letters beyond the usual: docs/glossary.md.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from torch_models.layers.linear import Linear, empty_param
from torch_models.layers.norm import RMSNormGated
from torch_models.layers.step import Entry, LayerCache, Step
from torch_models.taps import tap

CHUNK = 64  # tokens whose mutual effect is solved at once
L2_EPS = 1e-6  # inside the sum, whatever the config's eps


class CausalConv1d(nn.Module):
    """Every channel's sum over its last W values, weighted; the newest last. Weight [Z, 1, W], no bias."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = empty_param(channels, 1, taps)

    def forward(self, x_BSZ: torch.Tensor, length: int) -> torch.Tensor:
        """The last ``length`` sums, [B, T, Z] in float32, of values that begin W - 1 before them."""
        weight_ZW = self.weight[:, 0].float()
        x_BSZ = x_BSZ.float()
        taps = weight_ZW.shape[1]
        return sum(
            (x_BSZ[:, tap : tap + length] * weight_ZW[:, tap] for tap in range(1, taps)),
            x_BSZ[:, :length] * weight_ZW[:, 0],
        )


class GatedDeltaNet(nn.Module):
    """Projections, convolution, delta rule, gated norm, projection. The state is float32 whatever is computed in.

    A padded token changes nothing: it enters the convolution as zero, decays nothing and writes nothing.
    """

    path: str = ""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_key_heads: int,
        num_value_heads: int,
        key_head_dim: int,
        value_head_dim: int,
        taps: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.key_dim, self.value_dim = num_key_heads * key_head_dim, num_value_heads * value_head_dim
        channels = 2 * self.key_dim + self.value_dim
        self.in_proj_qkv = Linear(hidden_size, channels)
        self.in_proj_z = Linear(hidden_size, self.value_dim)
        self.in_proj_b = Linear(hidden_size, num_value_heads)
        self.in_proj_a = Linear(hidden_size, num_value_heads)
        self.conv1d = CausalConv1d(channels, taps)
        self.dt_bias = empty_param(num_value_heads)
        self.A_log = empty_param(num_value_heads)
        self.norm = RMSNormGated(value_head_dim, eps=eps)
        self.out_proj = Linear(self.value_dim, hidden_size)
        self.num_key_heads, self.num_value_heads = num_key_heads, num_value_heads
        self.key_head_dim, self.value_head_dim = key_head_dim, value_head_dim
        self.taps = taps

    def hold(self, channels: list[int], num_value_heads: int) -> None:
        """On a mesh: run on these heads alone, the ones whose weights are here.

        Args:
            channels: of ``in_proj_qkv`` that are here: those of queries, of keys and of values.
            num_value_heads: whose.
        """
        _, self.key_dim, self.value_dim = channels
        self.num_key_heads, self.num_value_heads = self.key_dim // self.key_head_dim, num_value_heads

    def forward(self, x_BTD: torch.Tensor, step: Step, cache: LayerCache | None = None) -> torch.Tensor:
        B, T, _ = x_BTD.shape
        mask_BT1 = step.mask_BT[..., None]
        x_BTD = x_BTD * mask_BT1
        qkv_BTZ = tap(self.path, "in_proj_qkv", self.in_proj_qkv(x_BTD))
        before_BWZ = qkv_BTZ.new_zeros(B, self.taps - 1, qkv_BTZ.shape[2]) if cache is None else cache["conv"]
        window_BSZ = torch.cat([before_BWZ, qkv_BTZ], dim=1)
        mixed_BTZ = F.silu(self.conv1d(window_BSZ, T)).to(x_BTD.dtype)
        mixed_BTZ = tap(self.path, "conv1d", mixed_BTZ).float()
        q_BTK, k_BTK, v_BTV = mixed_BTZ.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        q_BTJP, k_BTJP = (self._spread(part.reshape(B, T, -1, self.key_head_dim)) for part in (q_BTK, k_BTK))
        v_BTJY = v_BTV.reshape(B, T, -1, self.value_head_dim)
        rate_BTJ = tap(self.path, "in_proj_a", self.in_proj_a(x_BTD)).float()
        rate_BTJ = F.softplus(rate_BTJ + self.dt_bias.float())
        decay_BTJ = -self.A_log.float().exp() * rate_BTJ * mask_BT1
        decay_BTJ = tap(self.path, "decay", decay_BTJ)
        beta_BTJ = tap(self.path, "in_proj_b", self.in_proj_b(x_BTD)).float()
        beta_BTJ = tap(self.path, "beta", beta_BTJ.sigmoid() * mask_BT1)
        state_BJPY = v_BTJY.new_zeros(B, self.num_value_heads, self.key_head_dim, self.value_head_dim)
        if cache is not None:
            state_BJPY = cache["state"]
        parts = (q_BTJP * self.key_head_dim**-0.5, k_BTJP, v_BTJY, decay_BTJ, beta_BTJ)
        if T == 1 or step.keep_history:
            out_BTJY, states_BTJPY = recurrent_delta_rule(*parts, state_BJPY)
            state_BJPY = states_BTJPY[:, -1]
        else:
            states_BTJPY = None
            out_BTJY, state_BJPY = chunked_delta_rule(*parts, state_BJPY)
        if cache is not None and step.keep_history:
            assert states_BTJPY is not None
            cache["conv_history"], cache["state_history"] = window_BSZ, states_BTJPY
        elif cache is not None:
            cache["conv"].copy_(window_BSZ[:, T:])
            cache["state"].copy_(state_BJPY)
        gate_BTJY = tap(self.path, "in_proj_z", self.in_proj_z(x_BTD)).reshape(B, T, -1, self.value_head_dim)
        out_BTJY = tap(self.path, "delta_rule", out_BTJY.to(x_BTD.dtype))
        out_BTJY = tap(self.path, "norm", self.norm(out_BTJY, gate_BTJY))
        return tap(self.path, "out_proj", self.out_proj(out_BTJY.reshape(B, T, -1)))

    def _spread(self, x_BTIP: torch.Tensor) -> torch.Tensor:
        """Normed, and each key head repeated for its value heads."""
        normed_BTIP = x_BTIP * torch.rsqrt((x_BTIP * x_BTIP).sum(-1, keepdim=True) + L2_EPS)
        return normed_BTIP.repeat_interleave(self.num_value_heads // self.num_key_heads, dim=2)


def delta_entries(rows: int, *, channels: int, taps: int, state: tuple[int, int, int]) -> dict[str, Entry]:
    """What a gated delta net keeps: the last W - 1 inputs of its convolution, and its state [J, P, Y], float32."""
    return {
        "conv": Entry((rows, taps - 1, channels), ("B", "W", "QKV")),
        "state": Entry((rows, *state), ("B", "LN", "P", "Y"), torch.float32),
    }


def keep_first(cache: LayerCache, count_B: torch.Tensor) -> None:
    """Go back to the first ``count_B`` tokens (1 and more) of the run that left its history. In place."""
    if "state_history" not in cache:
        return
    window_BSZ, states_BTJPY = cache.pop("conv_history"), cache.pop("state_history")
    row_B = torch.arange(len(count_B), device=count_B.device)
    width = cache["conv"].shape[1]
    slots_BW = count_B[:, None] + torch.arange(width, device=count_B.device)
    cache["conv"].copy_(window_BSZ[row_B[:, None], slots_BW])
    cache["state"].copy_(states_BTJPY[row_B, count_B - 1])


def recurrent_delta_rule(
    q_BTJP: torch.Tensor,
    k_BTJP: torch.Tensor,
    v_BTJY: torch.Tensor,
    decay_BTJ: torch.Tensor,
    beta_BTJ: torch.Tensor,
    state_BJPY: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token: what is read, [B, T, J, Y], and the state after every token, [B, T, J, P, Y]; float32."""
    outs, states = [], []
    for t in range(q_BTJP.shape[1]):
        q_BJ1P, k_BJ1P = q_BTJP[:, t, :, None], k_BTJP[:, t, :, None]
        state_BJPY = state_BJPY * decay_BTJ[:, t, :, None, None].exp()
        known_BJ1Y = k_BJ1P @ state_BJPY
        news_BJ1Y = (v_BTJY[:, t, :, None] - known_BJ1Y) * beta_BTJ[:, t, :, None, None]
        state_BJPY = state_BJPY + k_BJ1P.transpose(-1, -2) * news_BJ1Y
        outs.append((q_BJ1P @ state_BJPY)[:, :, 0])
        states.append(state_BJPY)
    return torch.stack(outs, dim=1), torch.stack(states, dim=1)


def chunked_delta_rule(
    q_BTJP: torch.Tensor,
    k_BTJP: torch.Tensor,
    v_BTJY: torch.Tensor,
    decay_BTJ: torch.Tensor,
    beta_BTJ: torch.Tensor,
    state_BJPY: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, chunk by chunk: what is read, [B, T, J, Y], and the last state, [B, J, P, Y]; float32.

    Within a chunk, what a token writes depends on what the tokens before it wrote: a triangular system, solved once
    for the part that does not know the state before the chunk and once for the part that multiplies it.
    """
    T = q_BTJP.shape[1]
    size = min(CHUNK, T)

    def chunked(x: torch.Tensor) -> torch.Tensor:  # [B, T, J, ...] -> chunks of [B, J, Q, ...]
        rest = -T % size
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, rest))
        return x.unflatten(1, (-1, size)).movedim(1, 0).movedim(3, 2)

    q, k, v = (chunked(x) for x in (q_BTJP, k_BTJP, v_BTJY))
    beta, decay = chunked(beta_BTJ[..., None]), chunked(decay_BTJ[..., None])[..., 0].cumsum(-1)
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(later, float("-inf")).exp()
    system = (beta * k) @ k.transpose(-1, -2) * between
    solved = torch.linalg.solve_triangular(
        system, torch.cat([beta * v, beta * k * decay[..., None].exp()], dim=-1), upper=False, unitriangular=True
    )
    value, key = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    scores = q @ k.transpose(-1, -2) * between
    q_decayed = q * decay[..., None].exp()
    k_decayed = k * (decay[..., -1:] - decay)[..., None].exp()
    outs = []
    for chunk in range(len(q)):
        news_BJQY = value[chunk] - key[chunk] @ state_BJPY
        outs.append(q_decayed[chunk] @ state_BJPY + scores[chunk] @ news_BJQY)
        fading_BJ11 = decay[chunk][..., -1].exp()[..., None, None]
        state_BJPY = state_BJPY * fading_BJ11 + k_decayed[chunk].transpose(-1, -2) @ news_BJQY
    out_BTJY = torch.stack(outs, dim=1).movedim(2, 3).flatten(1, 2)[:, :T]
    return out_BTJY, state_BJPY
