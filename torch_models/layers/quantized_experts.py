"""The experts of a layer as stacks of 4-bit codes. Twin of the JAX file."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from loaders.quantization.schemes import BLOCK, Scheme
from torch_models import capturing
from torch_models.derived import alias_or_bind_derived_param, is_derived
from torch_models.kernels import nvfp4_blackwell
from torch_models.kernels.choice import Kernel
from torch_models.kernels.nvfp4_reference import quantized_activations
from torch_models.layers.linear import Join, empty_param
from torch_models.layers.lora import ExpertUpdates
from torch_models.layers.moe import Experts, places_of
from torch_models.layers.quantized import as_loaded, exact_weight, multiplier
from torch_models.taps import tap_rows


class NVFP4Experts(nn.Module):
    """All experts of a layer, ``w13`` [E, 2, M, D] (gate first) and ``w2`` [E, D, M], each with scales of its own.

    Gate and up of one expert may have different global scales: every half of the rows is multiplied by its own alpha.
    Derived: ``g1_alphas`` [E, 2] and ``g2_alphas`` [E], where they are used; and, for kernels that want it so, the
    block scales of every matrix in the kernel's order, which take the storage of the sources when they are as large.
    """

    path: str = ""
    summed: Join | None = None  # on a mesh, where experts or their width are cut
    held: range | None = None  # the experts that are here; None: all

    g1_alphas: torch.Tensor
    g2_alphas: torch.Tensor
    w13_blockscale_swizzled: torch.Tensor
    w2_blockscale_swizzled: torch.Tensor

    def __init__(self, plain: Experts, scheme: Scheme, kernel: Kernel, *, quantizes_inputs: bool) -> None:
        super().__init__()
        E, M, D = plain.num_experts, plain.expert_size, plain.hidden_size
        self.hidden_size, self.num_experts, self.expert_size = D, E, M
        scalar = (1,) if scheme.divides else ()
        for stack, lead, rows, inner in (("w13", (E, 2), M, D), ("w2", (E,), D, M)):
            shapes = {"codes": (rows, inner // 2), "block": (rows, inner // BLOCK), "global": scalar, "input": scalar}
            for role, leaf in scheme.leaves.items():
                setattr(self, f"{stack}_{leaf}", empty_param(*lead, *shapes[role]))
        self.scheme, self.kernel = scheme, kernel
        self.quantizes_inputs = scheme.activations and quantizes_inputs
        self.register_buffer("g1_alphas", torch.empty(E, 2, dtype=torch.float32, device="meta"), persistent=False)
        self.register_buffer("g2_alphas", torch.empty(E, dtype=torch.float32, device="meta"), persistent=False)

    def hold(self, experts: range | None) -> None:
        """Tell which experts are here, before anything is derived of them; None: all."""
        self.held = experts
        if experts is not None:
            self.g1_alphas, self.g2_alphas = (one[: len(experts)] for one in (self.g1_alphas, self.g2_alphas))

    def source(self, stack: str, role: str) -> torch.Tensor:
        """A tensor of the checkpoint as it was loaded, of stack ``w13`` or ``w2``."""
        return as_loaded(self, f"{stack}_{self.scheme.leaves[role]}")

    @torch.no_grad()
    def derive(self) -> None:
        """Compute the alphas anew, and bring block scales into the kernel's order if they are not in it."""
        self._derive_scalars()
        for stack in ("w13", "w2") if self.kernel.swizzles else ():
            block = f"{stack}_{self.scheme.leaves['block']}"
            if not is_derived(self, block):
                swizzled = nvfp4_blackwell.swizzled(self.get_parameter(block))
                alias_or_bind_derived_param(self, block, f"{stack}_blockscale_swizzled", swizzled)

    def dequantized(self, stack: str) -> torch.Tensor:
        """The weights of a stack, float32, with the roundings of the exporter's own definition."""
        scale = self._scalars(stack, "global", as_stored=True)[..., None, None]
        return exact_weight(self.source(stack, "codes"), self.source(stack, "block"), scale, self.scheme)

    def forward(
        self,
        x_BTD: torch.Tensor,
        weights_BTX: torch.Tensor,
        experts_BTX: torch.Tensor,
        updates: ExpertUpdates | None = None,
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts, in float32, returned in the dtype of x.

        ``updates``: what adapters add to both products, before they are rounded.
        """
        self._derive_scalars()
        ask_host = capturing.asks_host(x_BTD)
        place_A, experts_A, is_here_A1 = self._assigned(experts_BTX, ask_host=ask_host)
        token_A = torch.arange(experts_BTX.numel(), device=x_BTD.device)[place_A] // experts_BTX.shape[2]
        x_AD = x_BTD.flatten(0, 1)[token_A]
        gate_up_AF = self._first(x_AD, experts_A, ask_host=ask_host)
        if updates is not None:
            gate_up_AF = updates.first(gate_up_AF, x_AD, experts_A, token_A)
        gate_AM, up_AM = gate_up_AF.to(x_BTD.dtype).chunk(2, dim=1)
        lead = tuple(experts_BTX.shape)
        gate_AM = tap_rows(self.path, "gate_proj", gate_AM, place_A, lead)
        up_AM = tap_rows(self.path, "up_proj", up_AM, place_A, lead)
        hidden_AM = tap_rows(self.path, "product", F.silu(gate_AM) * up_AM, place_A, lead)
        out_AD = self._second(hidden_AM, experts_A, ask_host=ask_host)
        if updates is not None:
            out_AD = updates.second(out_AD, hidden_AM, experts_A, token_A)
        out_AD = tap_rows(self.path, "down_proj", out_AD.to(x_BTD.dtype), place_A, lead)
        if is_here_A1 is not None:
            out_AD = torch.where(is_here_A1, out_AD, 0)
        if isinstance(place_A, torch.Tensor):
            out_AD = out_AD.new_zeros(experts_BTX.numel(), out_AD.shape[1]).index_copy(0, place_A, out_AD)
        out_UXD = out_AD.view(*experts_BTX.flatten(0, 1).shape, -1)
        out_UD = torch.einsum("uxd,ux->ud", out_UXD.float(), weights_BTX.flatten(0, 1))
        out_UD = out_UD if self.summed is None else self.summed(out_UD)
        return out_UD.view(x_BTD.shape).to(x_BTD.dtype)

    def _assigned(
        self, experts_BTX: torch.Tensor, *, ask_host: bool
    ) -> tuple[torch.Tensor | slice, torch.Tensor, torch.Tensor | None]:
        """Which assignments run here, the place of each one's expert, and which of them count; None: all do.

        A prompt runs those of experts that are here. A step, which may ask nothing, runs others' too, by any expert.
        """
        if self.held is None:
            return slice(None), experts_BTX.flatten(), None
        experts_A = places_of(experts_BTX, self.held).flatten()
        if not ask_host:
            return slice(None), experts_A.clamp(min=0), (experts_A >= 0)[:, None]
        (place_A,) = (experts_A >= 0).nonzero(as_tuple=True)
        place_A = place_A if len(place_A) else place_A.new_zeros(1)  # kernels want a row
        return place_A, experts_A[place_A].clamp(min=0), (experts_A >= 0)[place_A, None]

    def _first(self, x_AD: torch.Tensor, experts_A: torch.Tensor, *, ask_host: bool) -> torch.Tensor:
        """Gate and up, float32 [A, 2M]."""
        codes, block = self.source("w13", "codes"), self._block_scales("w13")
        run = self.kernel.expert_matmul
        if not self.quantizes_inputs:
            return run(x_AD, codes.flatten(1, 2), block.flatten(1, 2), self.g1_alphas, experts_A, ask_host=ask_host)
        # gate and up may have different input scales, and so see different codes: each is an expert of its own here
        scale_A2 = self._scalars("w13", "input")[experts_A]
        rows_BD = quantized_activations(x_AD[:, None].expand(-1, 2, -1), scale_A2[..., None]).flatten(0, 1)
        halves_B = (experts_A[:, None] * 2 + torch.arange(2, device=experts_A.device)).flatten()
        alphas = self.g1_alphas.view(-1, 1)
        out_BM = run(rows_BD, codes.flatten(0, 1), block.flatten(0, 1), alphas, halves_B, ask_host=ask_host)
        return out_BM.view(len(experts_A), -1)

    def _second(self, x_AM: torch.Tensor, experts_A: torch.Tensor, *, ask_host: bool) -> torch.Tensor:
        """Down, float32 [A, D]."""
        if self.quantizes_inputs:
            x_AM = quantized_activations(x_AM, self._scalars("w2", "input")[experts_A][:, None])
        given = (self.source("w2", "codes"), self._block_scales("w2"), self.g2_alphas.view(-1, 1))
        return self.kernel.expert_matmul(x_AM, *given, experts_A, ask_host=ask_host)

    @torch.no_grad()
    def _derive_scalars(self) -> None:
        for stack, alphas in (("w13", self.g1_alphas), ("w2", self.g2_alphas)):
            scale = self._scalars(stack, "global")
            alphas.copy_(scale * self._scalars(stack, "input") if self.quantizes_inputs else scale)

    def _block_scales(self, stack: str) -> torch.Tensor:
        if not self.kernel.swizzles:
            return self.source(stack, "block")
        shape = self.get_parameter(f"{stack}_{self.scheme.leaves['block']}").shape
        return nvfp4_blackwell.unswizzled(getattr(self, f"{stack}_blockscale_swizzled"), tuple(shape))

    def _scalars(self, stack: str, role: str, *, as_stored: bool = False) -> torch.Tensor:
        """Global scales, [E, 2] or [E], as multipliers unless they are wanted as stored."""
        scale = self.source(stack, role)
        scale = scale.squeeze(-1) if self.scheme.divides else scale
        return scale if as_stored else multiplier(scale, self.scheme)
