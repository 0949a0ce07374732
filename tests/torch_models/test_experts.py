"""The three ways through the experts: shapes choose, and the answer is one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loaders.quantization.schemes import BLOCK, Scheme
from torch_models import capturing
from torch_models.capturing import STEP_TOKENS
from torch_models.derived import allocate_derived
from torch_models.kernels import nvfp4_reference
from torch_models.kernels.choice import Kernel
from torch_models.layers.moe import Experts
from torch_models.layers.quantized_experts import NVFP4Experts

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


@pytest.fixture(params=["cpu", "as on a device"], autouse=True)
def waits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU all shapes go one way; those of a device are tried here too."""
    if request.param != "cpu":
        monkeypatch.setattr(capturing, "asks_host", lambda x_BTD: x_BTD.shape[1] > STEP_TOKENS)


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


def coded_experts(held: range | None, rows_seen: list[int]) -> NVFP4Experts:
    """Four experts in codes, or those of them that are here, on a kernel that notes how many rows it is given."""

    def noting(x_AK: torch.Tensor, *args: torch.Tensor, **options: bool) -> torch.Tensor:
        rows_seen.append(len(x_AK))
        return nvfp4_reference.expert_matmul(x_AK, *args, **options)

    E, width = 4, 2 * BLOCK
    experts = NVFP4Experts(
        Experts(width, E, width),
        Scheme("nvfp4", activations=False),
        Kernel("noting", nvfp4_reference.matmul, noting),
        quantizes_inputs=False,
    )
    draw = torch.Generator().manual_seed(0)
    for name, param in list(experts.named_parameters()):
        if name.endswith("_weight"):
            value = torch.randint(0, 256, param.shape, generator=draw, dtype=torch.uint8)
        else:
            value = torch.rand(param.shape, generator=draw) + 0.1
            value = value.to(torch.float8_e4m3fn) if name.endswith("_scale") else value / 8
        here = slice(None) if held is None else slice(held.start, held.stop)
        setattr(experts, name, nn.Parameter(value[here].clone(), requires_grad=False))
    experts.hold(held)
    allocate_derived(experts, torch.device("cpu"))
    return experts


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, STEP_TOKENS + 1])
@pytest.mark.parametrize("chosen", [(0, 1, 2, 3), (2, 3)], ids=["of both", "of one"])
def test_ranks_with_some_of_the_experts_have_parts_of_the_sum(tokens: int, chosen: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(tokens)
    x_BTD = torch.randn(2, tokens, 2 * BLOCK, generator=draw)
    experts_BTX = torch.tensor(chosen)[torch.rand(2, tokens, len(chosen), generator=draw).topk(2).indices]
    weights_BTX = torch.rand(2, tokens, 2, generator=draw)
    seen: list[int] = []
    want = coded_experts(None, seen)(x_BTD, weights_BTX, experts_BTX)
    seen.clear()
    parts = [coded_experts(held, seen)(x_BTD, weights_BTX, experts_BTX) for held in (range(2), range(2, 4))]
    assert (sum(parts) - want).norm() <= 1e-6 * want.norm()
    assert min(seen) > 0  # kernels want a row
    if capturing.asks_host(x_BTD):  # they are run where their experts are
        here = [int((experts_BTX < 2).sum()), int((experts_BTX >= 2).sum())]
        assert seen == [max(count, 1) for count in here for _ in range(2)]
