"""Mixture of experts with one expert that every token has, behind a gate of its own."""

from __future__ import annotations

import jax
from flax import nnx
from jax.sharding import Mesh

from jax_models.layers.linear import Linear
from jax_models.layers.mlp import MLP
from jax_models.layers.moe import Experts, TopKRouter, routed
from jax_models.taps import tap


class SharedExpertMoeBlock(nnx.Module):
    """experts(x) + sigmoid(gate(x)) * shared_expert(x). Source: transformers ``Qwen3_5MoeSparseMoeBlock``."""

    path: str = ""

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int,
        expert_size: int,
        shared_size: int,
        top_k: int,
        norm_topk_prob: bool,
        mesh: Mesh | None,
    ) -> None:
        self.gate = TopKRouter(hidden_size, num_experts, top_k=top_k, norm_topk_prob=norm_topk_prob)
        self.experts = Experts(hidden_size, num_experts, expert_size, mesh)
        self.shared_expert = MLP(hidden_size, shared_size)
        self.shared_expert_gate = Linear(hidden_size, 1)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        weights_BTX, experts_BTX = routed(self.gate, x_BTD)
        gate_BT1 = tap(self.path, "shared_expert_gate", self.shared_expert_gate(x_BTD), "modules")
        shared_BTD = tap(self.path, "shared_expert", self.shared_expert(x_BTD), "modules")
        experts_BTD = tap(self.path, "experts", self.experts(x_BTD, weights_BTX, experts_BTX), "modules")
        return experts_BTD + jax.nn.sigmoid(gate_BT1) * shared_BTD
