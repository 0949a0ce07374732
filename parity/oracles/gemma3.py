"""Gemma 3, text. Source: transformers ``Gemma3ForCausalLM`` (5.23); capped scores, which it ignores, as in Gemma 2."""

from __future__ import annotations

from functools import partial

import numpy as np

from loaders.gemma3 import Gemma3Config
from parity.oracles.pieces import attend, capped, gelu_tanh, linear, rms_norm, visible
from parity.oracles.rope import rotate
from parity.oracles.run import Run, Weights


def forward(run: Run) -> None:
    """Embed, decode, norm, head."""
    config: Gemma3Config = run.config
    norm = partial(_norm, config)
    stored_VD = run.embedding()
    # computed in bfloat16 the factor is rounded to it, 6.46875 for 6.4807405: that is rounding, and judged as such
    factor = np.float64(np.float32(config.hidden_size**0.5))
    x_BTD = run.residual("hidden_states.0", stored_VD[run.ids_BT].astype(np.float64) * factor)
    for layer in range(config.num_hidden_layers):
        if (skipped_BTD := run.skipped(layer)) is not None:
            x_BTD = skipped_BTD
            continue
        read = run.text.under(f"layers.{layer}.")
        mixed_BTD = read.tap("self_attn", _attention(run, read, norm(read, "input_layernorm", x_BTD), layer))
        x_BTD = read.tap("residual", x_BTD + norm(read, "post_attention_layernorm", mixed_BTD))
        mixed_BTD = read.tap("mlp", _mlp(config, read, norm(read, "pre_feedforward_layernorm", x_BTD)))
        x_BTD = x_BTD + norm(read, "post_feedforward_layernorm", mixed_BTD)
        x_BTD = run.residual(f"hidden_states.{layer + 1}", x_BTD)
    x_BTD = run.final(_normed(config, run.text, "norm", x_BTD))
    run.out["logits"] = capped(run.head(x_BTD), config.final_logit_softcapping)


def _norm(config: Gemma3Config, read: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return read.tap(name, _normed(config, read, name, x))


def _normed(config: Gemma3Config, read: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return rms_norm(x, 1.0 + read(f"{name}.weight", x.shape[-1]), config.rms_norm_eps)


def _attention(run: Run, read: Weights, x_BTD: np.ndarray, layer: int) -> np.ndarray:
    config: Gemma3Config = run.config
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    B, T, D = x_BTD.shape
    project = partial(linear, read, bias=config.attention_bias)
    turn = run.rotation(config.rope(layer), H)
    q_BTNH = project("self_attn.q_proj", x_BTD, N * H).reshape(B, T, N, H)
    k_BSKH = project("self_attn.k_proj", x_BTD, K * H).reshape(B, T, K, H)
    v_BSKH = project("self_attn.v_proj", x_BTD, K * H).reshape(B, T, K, H)
    mixed = attend(
        read.tap("self_attn.q_rotated", rotate(_norm(config, read, "self_attn.q_norm", q_BTNH), *turn)),
        read.tap("self_attn.k_rotated", rotate(_norm(config, read, "self_attn.k_norm", k_BSKH), *turn)),
        v_BSKH,
        visible(run.mask_BT, config.window(layer)),
        scale=config.query_pre_attn_scalar**-0.5,
        cap=config.attn_logit_softcapping,
    )
    mixed = read.tap("self_attn.attention", mixed.reshape(B, T, N, H))
    return project("self_attn.o_proj", mixed.reshape(B, T, N * H), D)


def _mlp(config: Gemma3Config, read: Weights, x_BTD: np.ndarray) -> np.ndarray:
    F = config.intermediate_size
    gate_BTF, up_BTF = linear(read, "mlp.gate_proj", x_BTD, F), linear(read, "mlp.up_proj", x_BTD, F)
    product_BTF = read.tap("mlp.product", gelu_tanh(gate_BTF) * up_BTF)
    return linear(read, "mlp.down_proj", product_BTF, x_BTD.shape[-1])
