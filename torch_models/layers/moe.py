"""Mixture of experts: a router, and experts as stacks multiplied one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from torch_models import capturing
from torch_models.layers.linear import Join, empty_param
from torch_models.layers.lora import ExpertUpdates
from torch_models.taps import tap, tap_picked, tap_rows


class TopKRouter(nn.Module):
    """Softmax over all experts, then the best ``top_k``; ties go to the lower index.

    Logits stay float32 whatever the dtype of x. Source: transformers ``Qwen3MoeTopKRouter``.
    """

    path: str = ""

    def __init__(self, hidden_size: int, num_experts: int, *, top_k: int, norm_topk_prob: bool) -> None:
        super().__init__()
        self.weight = empty_param(num_experts, hidden_size)
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights, float32 [B, T, X], and experts, int64 [B, T, X], by falling weight."""
        return self.choose(tap(self.path, "logits", self.logits(x_BTD), "modules"))

    def logits(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """A score for every expert, float32 [B, T, E]."""
        weight_ED = self.weight.to(x_BTD.dtype).float()
        return F.linear(x_BTD.float(), weight_ED)

    def choose(self, logits_BTE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of the best scores, and their weights."""
        # a stable sort, not topk: which of two equal experts topk takes is not specified
        sorted_BTE, order_BTE = F.softmax(logits_BTE, dim=-1).sort(dim=-1, descending=True, stable=True)
        weights_BTX, experts_BTX = sorted_BTE[..., : self.top_k], order_BTE[..., : self.top_k]
        if self.norm_topk_prob:
            weights_BTX = weights_BTX / weights_BTX.sum(-1, keepdim=True)
        return weights_BTX, experts_BTX

    def weigh(self, logits_BTE: torch.Tensor, experts_BTX: torch.Tensor) -> torch.Tensor:
        """What the scores say of experts that were chosen elsewhere: weights as ``choose`` gives them."""
        weights_BTX = F.softmax(logits_BTE, dim=-1).gather(-1, experts_BTX.long())
        return weights_BTX / weights_BTX.sum(-1, keepdim=True) if self.norm_topk_prob else weights_BTX


def routed(gate: Any, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and experts, [B, T, X], of a router; where experts were handed in from elsewhere, these and its weights.

    ``gate``: a ``TopKRouter``, or what stands in its place.
    """
    weights_BTX, experts_BTX = gate(x_BTD)
    given_BTX = tap(gate.path, "", experts_BTX, "layers")
    if given_BTX is not experts_BTX:
        weights_BTX = gate.weigh(tap(gate.path, "logits", gate.logits(x_BTD), "modules"), given_BTX)
    return tap(gate.path, "weights", weights_BTX, "modules"), given_BTX


def places_of(experts_BTX: torch.Tensor, held: range) -> torch.Tensor:
    """Where experts are among those that are here, -1: nowhere."""
    place_BTX = experts_BTX - held.start
    return torch.where(place_BTX < len(held), place_BTX, -1).clamp(min=-1)


class Experts(nn.Module):
    """All experts of a layer: ``gate_up_proj`` [E, 2, M, D] (gate first) and ``down_proj`` [E, D, M]."""

    path: str = ""
    summed: Join | None = None  # on a mesh, where experts or their width are cut
    held: range | None = None  # the experts that are here; None: all

    def __init__(self, hidden_size: int, num_experts: int, expert_size: int) -> None:
        super().__init__()
        self.hidden_size, self.num_experts, self.expert_size = hidden_size, num_experts, expert_size
        self.gate_up_proj = empty_param(num_experts, 2, expert_size, hidden_size)
        self.down_proj = empty_param(num_experts, hidden_size, expert_size)

    def hold(self, experts: range | None) -> None:
        """Tell which experts are here; None: all."""
        self.held = experts

    def forward(
        self,
        x_BTD: torch.Tensor,
        weights_BTX: torch.Tensor,
        experts_BTX: torch.Tensor,
        updates: ExpertUpdates | None = None,
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts, in float32, returned in the dtype of x.

        A prompt, and on a CPU everything but a captured step, asks the host which experts were hit. Else shapes alone
        decide how: few assignments take copies of their experts' weights, others go through every expert.
        ``updates``: what adapters add to both products.
        """
        x_UD, lead = x_BTD.flatten(0, 1), tuple(experts_BTX.shape)
        if self.held is not None:
            experts_BTX = places_of(experts_BTX, self.held)
        if capturing.asks_host(x_BTD):
            out_UXD = self._of_hit(x_UD, experts_BTX.flatten(0, 1), updates, lead)
        elif experts_BTX.numel() <= len(self.down_proj):
            out_UXD = self._of_copies(x_UD, experts_BTX.flatten(0, 1), updates, lead)
        else:
            out_UXD = self._of_all(x_UD, experts_BTX.flatten(0, 1), updates, lead)
        if self.held is not None:
            out_UXD = torch.where(experts_BTX.flatten(0, 1)[..., None] >= 0, out_UXD, 0)
        # summed in a fixed order: an atomic add would not repeat on a GPU
        out_UD = torch.einsum("uxd,ux->ud", out_UXD.float(), weights_BTX.flatten(0, 1))
        out_UD = out_UD if self.summed is None else self.summed(out_UD)
        return out_UD.view(x_BTD.shape).to(x_BTD.dtype)

    def _of_copies(
        self, x_UD: torch.Tensor, experts_UX: torch.Tensor, updates: ExpertUpdates | None, lead: tuple[int, ...]
    ) -> torch.Tensor:
        experts_A, X = experts_UX.flatten(), experts_UX.shape[1]
        experts_A = experts_A if self.held is None else experts_A.clamp(min=0)
        x_AD = x_UD.repeat_interleave(X, dim=0)
        gate_A2MD = self.gate_up_proj.index_select(0, experts_A).to(x_UD.dtype)
        gate_up_AF = torch.bmm(gate_A2MD.flatten(1, 2), x_AD[..., None])[..., 0]
        token_A = torch.arange(len(experts_A), device=x_UD.device) // X
        if updates is not None:
            gate_up_AF = updates.first(gate_up_AF, x_AD, experts_A, token_A)
        gate_AM, up_AM = gate_up_AF.chunk(2, dim=1)
        gate_AM = tap_rows(self.path, "gate_proj", gate_AM, slice(None), lead)
        up_AM = tap_rows(self.path, "up_proj", up_AM, slice(None), lead)
        hidden_AM = tap_rows(self.path, "product", F.silu(gate_AM) * up_AM, slice(None), lead)
        down_ADM = self.down_proj.index_select(0, experts_A).to(x_UD.dtype)
        out_AD = torch.bmm(down_ADM, hidden_AM[..., None])[..., 0]
        if updates is not None:
            out_AD = updates.second(out_AD, hidden_AM, experts_A, token_A)
        return tap_rows(self.path, "down_proj", out_AD, slice(None), lead).view(*experts_UX.shape, -1)

    def _of_all(
        self, x_UD: torch.Tensor, experts_UX: torch.Tensor, updates: ExpertUpdates | None, lead: tuple[int, ...]
    ) -> torch.Tensor:
        x_EUD = x_UD.expand(len(self.down_proj), -1, -1)
        gate_up_EFD = self.gate_up_proj.to(x_UD.dtype).flatten(1, 2)
        gate_up_EUF = torch.bmm(x_EUD, gate_up_EFD.transpose(1, 2))
        row_U1 = torch.arange(len(x_UD), device=x_UD.device)[:, None]
        if updates is not None:
            gate_up_EUF = updates.first(gate_up_EUF, x_EUD, slice(None), row_U1[:, 0])
        gate_EUM, up_EUM = gate_up_EUF.chunk(2, dim=2)
        gate_EUM = tap_picked(self.path, "gate_proj", gate_EUM, (experts_UX, row_U1), lead)
        up_EUM = tap_picked(self.path, "up_proj", up_EUM, (experts_UX, row_U1), lead)
        hidden_EUM = tap_picked(self.path, "product", F.silu(gate_EUM) * up_EUM, (experts_UX, row_U1), lead)
        out_EUD = torch.bmm(hidden_EUM, self.down_proj.to(x_UD.dtype).transpose(1, 2))
        if updates is not None:
            out_EUD = updates.second(out_EUD, hidden_EUM, slice(None), row_U1[:, 0])
        out_EUD = tap_picked(self.path, "down_proj", out_EUD, (experts_UX, row_U1), lead)
        return out_EUD[experts_UX, row_U1]  # picked, not weighted by zero: an expert nobody chose may be infinite

    def _of_hit(
        self, x_UD: torch.Tensor, experts_UX: torch.Tensor, updates: ExpertUpdates | None, lead: tuple[int, ...]
    ) -> torch.Tensor:
        experts_A, X = experts_UX.flatten(), experts_UX.shape[1]
        hit, counts = (found.tolist() for found in experts_A.unique(return_counts=True))
        order_A = experts_A.argsort(stable=True)
        if hit[0] < 0:  # another rank's come first
            order_A, hit, counts = order_A[counts[0] :], hit[1:], counts[1:]
        out_UXD = x_UD.new_zeros(*experts_UX.shape, x_UD.shape[1])
        if not hit:
            return out_UXD
        token_A = order_A // X
        rows_AD = x_UD[token_A]

        def by_expert(product: Callable[..., torch.Tensor], rows_AK: torch.Tensor) -> torch.Tensor:
            given = zip(hit, rows_AK.split(counts), token_A.split(counts), strict=True)
            return torch.cat([product(*one) for one in given])

        def first(expert: int, rows_HD: torch.Tensor, token_H: torch.Tensor) -> torch.Tensor:
            gate_up_HF = F.linear(rows_HD, self.gate_up_proj[expert].flatten(0, 1).to(x_UD.dtype))
            if updates is None:
                return gate_up_HF
            return torch.cat([*updates.parts(gate_up_HF.chunk(2, dim=1), rows_HD, expert, token_H)], dim=1)

        def second(expert: int, hidden_HM: torch.Tensor, token_H: torch.Tensor) -> torch.Tensor:
            out_HD = F.linear(hidden_HM, self.down_proj[expert].to(x_UD.dtype))
            return out_HD if updates is None else updates.second(out_HD, hidden_HM, expert, token_H)

        # each by itself, as values that are handed in: activations of what lies otherwise in memory may differ in a bit
        gate_AM, up_AM = (half_AM.contiguous() for half_AM in by_expert(first, rows_AD).chunk(2, dim=1))
        gate_AM = tap_rows(self.path, "gate_proj", gate_AM, order_A, lead)
        up_AM = tap_rows(self.path, "up_proj", up_AM, order_A, lead)
        hidden_AM = tap_rows(self.path, "product", F.silu(gate_AM) * up_AM, order_A, lead)
        out_AD = by_expert(second, hidden_AM)
        out_UXD.flatten(0, 1)[order_A] = tap_rows(self.path, "down_proj", out_AD, order_A, lead)
        return out_UXD


class SparseMoeBlock(nn.Module):
    """Router and experts. Source: transformers ``Qwen3MoeSparseMoeBlock``."""

    path: str = ""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int,
        expert_size: int,
        top_k: int,
        norm_topk_prob: bool,
    ) -> None:
        super().__init__()
        self.gate = TopKRouter(hidden_size, num_experts, top_k=top_k, norm_topk_prob=norm_topk_prob)
        self.experts = Experts(hidden_size, num_experts, expert_size)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        weights_BTX, experts_BTX = routed(self.gate, x_BTD)
        return tap(self.path, "experts", self.experts(x_BTD, weights_BTX, experts_BTX), "modules")
