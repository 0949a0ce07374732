"""Qwen3.5, text: gated delta nets and gated attention, dense or mixture of experts, and its draft.

Linear attention is the plain recurrence, token by token: the check of every chunked form. Source: transformers
``Qwen3_5ForCausalLM``, ``Qwen3_5MoeForCausalLM`` and, for the draft, ``MtpModel`` (5.23).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from loaders.qwen3_5 import Qwen3_5Config, Qwen3_5MoeConfig
from parity.oracles.pieces import attend, experts, linear, rms_norm, route, sigmoid, silu, swiglu, visible
from parity.oracles.rope import rotate
from parity.oracles.run import Run, Weights

L2_EPS = 1e-6  # whatever rms_norm_eps says


def forward(run: Run) -> None:
    """Embed, decode, norm, head."""
    config: Qwen3_5Config = run.config
    x_BTD = run.residual("hidden_states.0", run.embedded())
    for layer in range(config.num_hidden_layers):
        if (skipped_BTD := run.skipped(layer)) is not None:
            x_BTD = skipped_BTD
            continue
        read = run.text.under(f"layers.{layer}.")
        x_BTD = _layer(run, read, x_BTD, is_linear=config.has_linear_attention(layer), routing=f"routing.{layer + 1}")
        x_BTD = run.residual(f"hidden_states.{layer + 1}", run.deepened(x_BTD, layer))
    x_BTD = run.final(_norm(config, run.text, "norm", x_BTD))
    run.out["logits"] = run.head(x_BTD)


def draft(run: Run) -> None:
    """From the final hidden state at t and the token at t+1: what comes at t+2. S is T + 1 here."""
    norm, read = partial(_norm, run.config), run.weights.under("mtp.")
    mask_BS, embedded_BSD = run.mask_BT, run.embedded()
    is_real_BT = mask_BS[:, 1:] & mask_BS[:, :-1]
    rows = replace(run, ids_BT=run.ids_BT[:, 1:], mask_BT=is_real_BT, positions=run.positions[..., 1:])
    token_BTD = norm(read, "pre_fc_norm_embedding", embedded_BSD[:, 1:])
    hidden_BTD = norm(read, "pre_fc_norm_hidden", run.out["final_hidden_state"][:, :-1])
    x_BTD = linear(read, "fc", np.concatenate([token_BTD, hidden_BTD], axis=-1), run.config.hidden_size)
    x_BTD = _layer(rows, read.under("layers.0."), x_BTD, is_linear=False, routing="mtp.routing.1")
    x_BTD = run.out["mtp.hidden_state"] = norm(read, "norm", x_BTD)
    run.out["mtp.logits"] = run.head(x_BTD)


def _norm(config: Qwen3_5Config, read: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return rms_norm(x, 1.0 + read(f"{name}.weight", x.shape[-1]), config.rms_norm_eps)


def _layer(run: Run, read: Weights, x_BTD: np.ndarray, *, is_linear: bool, routing: str) -> np.ndarray:
    config: Qwen3_5Config = run.config
    mix = _delta_net if is_linear else _attention
    normed_BTD = read.tap("input_layernorm", _norm(config, read, "input_layernorm", x_BTD))
    mixed_BTD = read.tap("linear_attn" if is_linear else "self_attn", mix(run, read, normed_BTD))
    x_BTD = read.tap("residual", x_BTD + mixed_BTD)
    normed_BTD = read.tap("post_attention_layernorm", _norm(config, read, "post_attention_layernorm", x_BTD))
    if not isinstance(config, Qwen3_5MoeConfig):
        return x_BTD + read.tap("mlp", swiglu(read, "mlp.", normed_BTD, config.intermediate_size))
    logits, chosen, weights = route(config, read, normed_BTD, run.mask_BT, run.replayed.get(routing))
    run.route(routing, logits, chosen)
    gate_BT1 = sigmoid(linear(read, "mlp.shared_expert_gate", normed_BTD, 1))
    shared_BTD = swiglu(read, "mlp.shared_expert.", normed_BTD, config.shared_expert_intermediate_size)
    shared_BTD = read.tap("mlp.shared_expert", shared_BTD)
    experts_BTD = read.tap("mlp.experts", experts(config, read, normed_BTD, chosen, weights))
    return x_BTD + read.tap("mlp", experts_BTD + gate_BT1 * shared_BTD)


def _attention(run: Run, read: Weights, x_BTD: np.ndarray) -> np.ndarray:
    config: Qwen3_5Config = run.config
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    B, T, D = x_BTD.shape
    project = partial(linear, read, bias=config.attention_bias)
    turn = run.rotation(config.rope_parameters, config.rotary_dim)
    q_and_gate = project("self_attn.q_proj", x_BTD, N * 2 * H).reshape(B, T, N, 2 * H)
    q_BTNH, gate_BTNH = q_and_gate[..., :H], q_and_gate[..., H:]
    k_BSKH = project("self_attn.k_proj", x_BTD, K * H).reshape(B, T, K, H)
    v_BSKH = project("self_attn.v_proj", x_BTD, K * H).reshape(B, T, K, H)
    q_BTNH = read.tap("self_attn.q_norm", _norm(config, read, "self_attn.q_norm", q_BTNH))
    q_BTNH = read.tap("self_attn.q_rotated", rotate(q_BTNH, *turn))
    k_BSKH = read.tap("self_attn.k_norm", _norm(config, read, "self_attn.k_norm", k_BSKH))
    k_BSKH = read.tap("self_attn.k_rotated", rotate(k_BSKH, *turn))
    mixed = attend(q_BTNH, k_BSKH, v_BSKH, visible(run.mask_BT, None), scale=H**-0.5)
    mixed_BTNH = read.tap("self_attn.attention", mixed.reshape(B, T, N, H))
    mixed_BTNH = read.tap("self_attn.gated", mixed_BTNH * sigmoid(gate_BTNH))
    return project("self_attn.o_proj", mixed_BTNH.reshape(B, T, N * H), D)


def _delta_net(run: Run, read: Weights, x_BTD: np.ndarray) -> np.ndarray:
    config: Qwen3_5Config = run.config
    read = read.under("linear_attn.")
    J, P, Y = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    Z = 2 * config.key_dim + J * Y
    B, T, D = x_BTD.shape
    is_real_BT1 = run.mask_BT[..., None]
    x_BTD = x_BTD * is_real_BT1
    taps_ZW = read("conv1d.weight", Z, 1, config.linear_conv_kernel_dim)[:, 0]
    mixed_BTZ = read.tap("conv1d", silu(_causal_conv(linear(read, "in_proj_qkv", x_BTD, Z), taps_ZW)))
    q, k, v = np.split(mixed_BTZ, [config.key_dim, 2 * config.key_dim], axis=-1)
    q_BTIP, k_BTIP = _unit(q.reshape(B, T, -1, P)) * P**-0.5, _unit(k.reshape(B, T, -1, P))
    sharing = J // config.linear_num_key_heads  # value heads in a row read the same key head
    q_BTJP, k_BTJP = np.repeat(q_BTIP, sharing, axis=2), np.repeat(k_BTIP, sharing, axis=2)
    rate_BTJ = np.exp(read("A_log", J)) * np.logaddexp(0.0, linear(read, "in_proj_a", x_BTD, J) + read("dt_bias", J))
    # padding neither fades the state nor writes to it
    decay_BTJ = read.tap("decay", np.where(is_real_BT1, -rate_BTJ, 0.0))
    beta_BTJ = np.where(is_real_BT1, sigmoid(linear(read, "in_proj_b", x_BTD, J)), 0.0)
    beta_BTJ = read.tap("beta", beta_BTJ)
    out_BTJY = _recurrence(q_BTJP, k_BTJP, v.reshape(B, T, J, Y), np.exp(decay_BTJ), beta_BTJ)
    gate_BTJY = silu(linear(read, "in_proj_z", x_BTD, J * Y)).reshape(B, T, J, Y)
    out_BTJY = rms_norm(read.tap("delta_rule", out_BTJY), read("norm.weight", Y), config.rms_norm_eps)
    out_BTJY = read.tap("norm", out_BTJY * gate_BTJY)
    return linear(read, "out_proj", out_BTJY.reshape(B, T, J * Y), D)


def _causal_conv(x_BTZ: np.ndarray, taps_ZW: np.ndarray) -> np.ndarray:
    """Each channel by itself: the last tap meets the token, the first the one W - 1 before it; nothing before is 0."""
    T, W = x_BTZ.shape[1], taps_ZW.shape[1]
    padded = np.pad(x_BTZ, ((0, 0), (W - 1, 0), (0, 0)))
    return sum((padded[:, tap : tap + T] * taps_ZW[:, tap] for tap in range(W)), np.zeros_like(x_BTZ))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).sum(axis=-1, keepdims=True) + L2_EPS)


def _recurrence(
    q_BTJP: np.ndarray, k_BTJP: np.ndarray, v_BTJY: np.ndarray, kept_BTJ: np.ndarray, beta_BTJ: np.ndarray
) -> np.ndarray:
    """The gated delta rule. Source: arXiv:2412.06464, eq. 10.

    The state maps keys to values. It fades; then what it says of the token's key moves by beta towards its value.
    """
    B, T, J, P = q_BTJP.shape
    state_BJPY = np.zeros((B, J, P, v_BTJY.shape[-1]))
    out_BTJY = np.empty_like(v_BTJY)
    for step in range(T):
        q_BJ1P, k_BJ1P = q_BTJP[:, step, :, None], k_BTJP[:, step, :, None]
        state_BJPY = state_BJPY * kept_BTJ[:, step, :, None, None]
        change_BJ1Y = (v_BTJY[:, step, :, None] - k_BJ1P @ state_BJPY) * beta_BTJ[:, step, :, None, None]
        state_BJPY = state_BJPY + k_BJ1P.swapaxes(-1, -2) * change_BJ1Y
        out_BTJY[:, step] = (q_BJ1P @ state_BJPY)[:, :, 0]
    return out_BTJY
