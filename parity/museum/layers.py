"""Layers of the museum's engine, sound ones. Each has tensors in a checkpoint, and something that is derived from them.

A norm that keeps 1 + w, codes with scales that a kernel wants in another order, an absorbed projection, experts stacked
and padded for their kernel: what upstream bugs were about. Letters: docs/glossary.md; P is F, padded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional

V, D, F, P, E, H = 13, 6, 5, 8, 2, 4

Kinds = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # checkpoint name within the part -> shape, dtype


class Part(nn.Module):
    """A layer that knows its checkpoint tensors. ``place`` writes one; ``read`` gives it back.

    Attributes:
        tensors: its checkpoint tensors, by name within the part.
    """

    tensors: Kinds = {}

    def __init__(self) -> None:
        super().__init__()
        for name, (shape, dtype) in self.tensors.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))

    def place(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor in the checkpoint's layout."""
        self.get_parameter(name).data.copy_(tensor)

    def read(self, name: str) -> torch.Tensor:
        """One tensor in the checkpoint's layout."""
        return self.get_parameter(name)

    def process_weights_after_loading(self) -> None:
        """Derive what the forward reads from what was loaded, in place."""


class Table(Part):
    """Embedding or head."""

    weight: nn.Parameter
    tensors = {"weight": ((V, D), torch.float32)}
    num_embeddings, embedding_dim = V, D

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return functional.embedding(ids, self.weight)


class Norm(Part):
    """RMS norm whose weight stands for 1 + w."""

    weight: nn.Parameter
    gemma_weight: torch.Tensor
    tensors = {"weight": ((D,), torch.float32)}

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gemma_weight", torch.ones(D), persistent=False)

    def process_weights_after_loading(self) -> None:
        torch.add(self.weight, 1.0, out=self.gemma_weight)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + 1e-6) * self.gemma_weight


class Linear(Part):
    """Codes with a scale for every row, which the kernel wants backwards and with the inputs' scale in it."""

    weight: nn.Parameter
    weight_scale: nn.Parameter
    input_scale: nn.Parameter
    alpha: torch.Tensor
    tensors = {
        "weight": ((D, D), torch.int8),
        "weight_scale": ((D,), torch.float32),
        "input_scale": ((), torch.float32),
    }

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.zeros(D), persistent=False)

    def process_weights_after_loading(self) -> None:
        torch.mul(self.weight_scale.flip(0), self.input_scale, out=self.alpha)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return (x_TD @ self.weight.to(x_TD.dtype).T) * self.alpha.flip(0)


class Absorbed(Part):
    """Attention's latent projection, split and turned as multi-head latent attention absorbs it."""

    weight: nn.Parameter
    w_kc: torch.Tensor
    w_vc: torch.Tensor
    tensors = {"weight": ((2 * H, D), torch.float32)}

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w_kc", torch.zeros(D, H), persistent=False)
        self.register_buffer("w_vc", torch.zeros(H, D), persistent=False)

    def process_weights_after_loading(self) -> None:
        self.w_kc.copy_(self.weight[:H].T)
        self.w_vc.copy_(self.weight[H:])

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD @ self.w_kc @ self.w_vc


class Experts(Part):
    """Experts one by one in the file, stacked here, up before gate and padded to P for the kernel."""

    w13_kernel: torch.Tensor
    w2_kernel: torch.Tensor
    tensors = {
        "router.weight": ((E, D), torch.float32),
        **{
            f"{expert}.{which}.weight": (shape, torch.float32)
            for expert in range(E)
            for which, shape in (("gate_proj", (F, D)), ("up_proj", (F, D)), ("down_proj", (D, F)))
        },
    }
    shards = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.router = nn.Parameter(torch.empty(E, D), requires_grad=False)
        self.w13 = nn.Parameter(torch.empty(E, 2 * F, D), requires_grad=False)
        self.w2 = nn.Parameter(torch.empty(E, D, F), requires_grad=False)
        self.register_buffer("w13_kernel", torch.zeros(E, 2 * P, D), persistent=False)
        self.register_buffer("w2_kernel", torch.zeros(E, D, P), persistent=False)

    def weight_loader(self, param: nn.Parameter, tensor: torch.Tensor, *, shard_id: str, expert_id: int) -> None:
        """Write one matrix of one expert to its place in a stack."""
        rows = {"w1": slice(0, F), "w3": slice(F, 2 * F), "w2": slice(0, D)}[shard_id]
        param.data[expert_id, rows].copy_(tensor)

    def place(self, name: str, tensor: torch.Tensor) -> None:
        if name == "router.weight":
            self.router.data.copy_(tensor)
            return
        expert, which, _ = name.split(".")
        param = self.w2 if which == "down_proj" else self.w13
        self.weight_loader(param, tensor, shard_id=self.shards[which], expert_id=int(expert))

    def read(self, name: str) -> torch.Tensor:
        if name == "router.weight":
            return self.router
        expert, which, _ = name.split(".")
        stack = {"gate_proj": self.w13[:, :F], "up_proj": self.w13[:, F:], "down_proj": self.w2}[which]
        return stack[int(expert)]

    def process_weights_after_loading(self) -> None:
        self.w13_kernel.zero_()
        self.w13_kernel[:, :F].copy_(self.w13[:, F:])
        self.w13_kernel[:, P : P + F].copy_(self.w13[:, :F])
        self.w2_kernel.zero_()
        self.w2_kernel[:, :, :F].copy_(self.w2)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        share_TE = functional.softmax(x_TD @ self.router.T, -1)
        up_ETP, gate_ETP = (x_TD @ self.w13_kernel.transpose(1, 2)).chunk(2, -1)
        out_ETD = (functional.silu(gate_ETP) * up_ETP) @ self.w2_kernel.transpose(1, 2)
        return (share_TE.T[..., None] * out_ETD).sum(0)
