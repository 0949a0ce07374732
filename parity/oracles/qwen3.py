"""Qwen3, dense and mixture of experts. Source: transformers ``Qwen3ForCausalLM``, ``Qwen3MoeForCausalLM`` (5.23)."""

from __future__ import annotations

from functools import partial

import numpy as np

from loaders.qwen3 import Qwen3Config, Qwen3MoeConfig
from parity.oracles.pieces import attend, experts, linear, rms_norm, route, swiglu, visible
from parity.oracles.rope import rotate
from parity.oracles.run import Run, Weights


def forward(run: Run) -> None:
    """Embed, decode, norm, head."""
    config: Qwen3Config = run.config
    D, eps = config.hidden_size, config.rms_norm_eps
    turn = run.rotation(config.rope_parameters, config.rotary_dim)
    x_BTD = run.residual("hidden_states.0", run.embedded())
    for layer in range(config.num_hidden_layers):
        if (skipped_BTD := run.skipped(layer)) is not None:
            x_BTD = skipped_BTD
            continue
        read = run.text.under(f"layers.{layer}.")
        visible_BTS = visible(run.mask_BT, config.window(layer))
        normed_BTD = read.tap("input_layernorm", rms_norm(x_BTD, read("input_layernorm.weight", D), eps))
        mixed_BTD = read.tap("self_attn", _attention(config, read, normed_BTD, turn, visible_BTS))
        x_BTD = read.tap("residual", x_BTD + mixed_BTD)
        normed_BTD = rms_norm(x_BTD, read("post_attention_layernorm.weight", D), eps)
        normed_BTD = read.tap("post_attention_layernorm", normed_BTD)
        if isinstance(config, Qwen3MoeConfig) and config.is_sparse(layer):
            name = f"routing.{layer + 1}"
            logits, chosen, weights = route(config, read, normed_BTD, run.mask_BT, run.replayed.get(name))
            run.route(name, logits, chosen)
            mixed_BTD = read.tap("mlp.experts", experts(config, read, normed_BTD, chosen, weights))
        else:
            mixed_BTD = swiglu(read, "mlp.", normed_BTD, config.intermediate_size)
        x_BTD = x_BTD + read.tap("mlp", mixed_BTD)
        x_BTD = run.residual(f"hidden_states.{layer + 1}", run.deepened(x_BTD, layer))
    x_BTD = run.final(rms_norm(x_BTD, run.text("norm.weight", D), eps))
    run.out["logits"] = run.head(x_BTD)


def _attention(
    config: Qwen3Config,
    read: Weights,
    x_BTD: np.ndarray,
    turn: tuple[np.ndarray, np.ndarray],
    visible_BTS: np.ndarray,
) -> np.ndarray:
    N, K, H, eps = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps
    B, T, D = x_BTD.shape
    project = partial(linear, read, bias=config.attention_bias)
    q_BTNH = project("self_attn.q_proj", x_BTD, N * H).reshape(B, T, N, H)
    k_BSKH = project("self_attn.k_proj", x_BTD, K * H).reshape(B, T, K, H)
    v_BSKH = project("self_attn.v_proj", x_BTD, K * H).reshape(B, T, K, H)
    q_BTNH = read.tap("self_attn.q_norm", rms_norm(q_BTNH, read("self_attn.q_norm.weight", H), eps))
    q_BTNH = read.tap("self_attn.q_rotated", rotate(q_BTNH, *turn))
    k_BSKH = read.tap("self_attn.k_norm", rms_norm(k_BSKH, read("self_attn.k_norm.weight", H), eps))
    k_BSKH = read.tap("self_attn.k_rotated", rotate(k_BSKH, *turn))
    mixed = attend(q_BTNH, k_BSKH, v_BSKH, visible_BTS, scale=H**-0.5)
    mixed = read.tap("self_attn.attention", mixed.reshape(B, T, N, H))
    return project("self_attn.o_proj", mixed.reshape(B, T, N * H), D)
