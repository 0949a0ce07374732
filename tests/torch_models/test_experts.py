"""The three ways through the experts: shapes choose, and the answer is one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_models.layers.moe import STEP_TOKENS, Experts

D, M, X = 20, 12, 3
# experts, rows, tokens a row
SHAPES = {
    "copies": (16, 5, 1),
    "copies of a short prompt": (16, 1, 5),
    "all": (4, 5, 1),
    "all, a draft's tokens": (4, 2, STEP_TOKENS),
    "hit": (4, 2, STEP_TOKENS + 1),
    "hit, few of many": (64, 3, 30),
}


def experts_of(num_experts: int, dtype: torch.dtype = torch.float32) -> Experts:
    experts, draw = Experts(D, num_experts, M), torch.Generator().manual_seed(num_experts)
    experts.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2, M, D, generator=draw).to(dtype) / 4)
    experts.down_proj = nn.Parameter(torch.randn(num_experts, D, M, generator=draw).to(dtype) / 4)
    return experts


def routed(num_experts: int, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(rows)
    x_BTD = torch.randn(rows, tokens, D, generator=draw)
    best = torch.rand(rows, tokens, num_experts, generator=draw).topk(X)
    return x_BTD, best.values, best.indices


def by_definition(experts: Experts, x_BTD: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Assignment by assignment, in float64."""
    gate_up, down, out = experts.gate_up_proj.double(), experts.down_proj.double(), torch.zeros_like(x_BTD).double()
    for row, token, choice in torch.cartesian_prod(*map(torch.arange, chosen.shape)).tolist():
        expert, x_D = chosen[row, token, choice], x_BTD[row, token].double()
        hidden_M = F.silu(gate_up[expert, 0] @ x_D) * (gate_up[expert, 1] @ x_D)
        out[row, token] += weights[row, token, choice].double() * (down[expert] @ hidden_M)
    return out


@torch.no_grad()
@pytest.mark.parametrize("way", SHAPES)
def test_every_way_sums_the_chosen_experts(way: str) -> None:
    experts, inputs = experts_of(SHAPES[way][0]), routed(*SHAPES[way])
    want = by_definition(experts, *inputs)
    got = experts(*inputs)
    assert (got.dtype, got.shape) == (torch.float32, want.shape)
    assert (got - want).norm() <= 1e-6 * want.norm()


@torch.no_grad()
@pytest.mark.parametrize("way", SHAPES)
def test_so_it_does_in_bfloat16_from_float32_weights(way: str) -> None:
    experts, inputs = experts_of(SHAPES[way][0]), routed(*SHAPES[way])
    want = by_definition(experts, *inputs)
    got = experts(inputs[0].bfloat16(), *inputs[1:])
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() <= 0.01 * want.norm()


@torch.no_grad()
@pytest.mark.parametrize("way", SHAPES)
def test_an_expert_that_nobody_chose_may_be_anything(way: str) -> None:
    experts, (x_BTD, weights, chosen) = experts_of(SHAPES[way][0]), routed(*SHAPES[way])
    chosen = chosen.clamp(min=1)
    want = experts(x_BTD, weights, chosen)
    experts.down_proj[0] = float("inf")
    assert torch.equal(experts(x_BTD, weights, chosen), want)
