"""The float64 oracle: what a checkpoint of the Qwen3 family says, free of any framework and of rounding that matters.

Both backends are judged by their distance to it, so it shares no code with either: NumPy, written from the semantics.
transformers' ``model.double()`` is no substitute: its norms, rotary tables and router stay float32.

Letters: B batch, T query and S key positions, D hidden_size, F intermediate size, N query heads, K key/value heads,
G = N / K, H head_dim, R = H / 2, V vocab, E experts, X experts per token. Source: transformers ``Qwen3ForCausalLM`` and
``Qwen3MoeForCausalLM`` (5.23); checked against them in tests/parity/test_oracle.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from loaders import Checkpoint
from loaders.qwen3 import Qwen3Config, Qwen3MoeConfig
from parity.oracle_inputs import checked_config, checked_inputs, checked_routing, stored, widened
from parity.oracle_rope import rotate, rotation

HEAD_ROWS = 8192  # rows of the head widened at a time: all of V x D in float64 is four times the stored bf16

Read = Callable[..., np.ndarray]  # (name, *shape) -> the tensor in float64


def oracle_forward(
    checkpoint: Checkpoint,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    position_ids: np.ndarray | None = None,
    *,
    routing: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Run the checkpoint in float64 on its stored weights, reading one weight at a time.

    Positions whose mask is 0 carry no meaning, but everything returned is finite.

    Args:
        checkpoint: of Qwen3ForCausalLM or Qwen3MoeForCausalLM.
        input_ids: integers [B, T].
        attention_mask: [B, T], 1 = real, padding on either side. None: all real.
        position_ids: integers [B, T]. None: real tokens counted from 0 in each row.
        routing: experts to use instead of choosing, named ``routing.i`` as in the result; layers left out choose. So a
            low-precision run that flips near-ties is compared under its own choices. Values at padding are ignored.

    Returns:
        float64 ``logits`` [B, T, V]; ``hidden_states.0`` [B, T, D] (embeddings); ``hidden_states.i`` (residual stream
        after decoder layer i, i from 1); ``final_hidden_state`` (after the final norm); and of every sparse layer
        ``router_logits.i`` [B, T, E] and int32 ``routing.i`` [B, T, X]: experts by falling weight, ties by index, or as
        replayed.

    Raises:
        ValueError: inputs or routing of the wrong shape, dtype or range.
        CheckpointError: a tensor is missing, has another shape than config.json asks for, or a dtype that is not exact.
    """
    config = checked_config(checkpoint)
    ids_BT, mask_BT, positions_BT = checked_inputs(config, input_ids, attention_mask, position_ids)
    replayed = checked_routing(config, routing or {}, mask_BT)
    cos_BTR, sin_BTR = rotation(config, positions_BT)
    out: dict[str, np.ndarray] = {}
    x_BTD = stored(checkpoint, "model.embed_tokens.weight", config.vocab_size, config.hidden_size)[ids_BT]
    x_BTD = out["hidden_states.0"] = x_BTD.astype(np.float64)
    for layer in range(config.num_hidden_layers):
        read = partial(widened, checkpoint, f"model.layers.{layer}.")
        visible_BTS = _visible(mask_BT, config.window(layer))
        normed_BTD = _rms_norm(x_BTD, read("input_layernorm.weight", config.hidden_size), config.rms_norm_eps)
        x_BTD = x_BTD + _attention(config, read, normed_BTD, cos_BTR, sin_BTR, visible_BTS)
        normed_BTD = _rms_norm(x_BTD, read("post_attention_layernorm.weight", config.hidden_size), config.rms_norm_eps)
        if isinstance(config, Qwen3MoeConfig) and config.is_sparse(layer):
            name = f"routing.{layer + 1}"
            logits_BTE, experts_BTX, weights_BTX = _route(config, read, normed_BTD, mask_BT, replayed.get(name))
            out[f"router_logits.{layer + 1}"], out[name] = logits_BTE, experts_BTX.astype(np.int32)
            x_BTD = x_BTD + _experts(config, read, normed_BTD, experts_BTX, weights_BTX)
        else:
            x_BTD = x_BTD + _swiglu(read, "mlp.", normed_BTD, config.intermediate_size)
        out[f"hidden_states.{layer + 1}"] = x_BTD
    norm_D = widened(checkpoint, "model.", "norm.weight", config.hidden_size)
    x_BTD = out["final_hidden_state"] = _rms_norm(x_BTD, norm_D, config.rms_norm_eps)
    out["logits"] = _head(checkpoint, config, x_BTD)
    return out


def _attention(
    config: Qwen3Config,
    read: Read,
    x_BTD: np.ndarray,
    cos_BTR: np.ndarray,
    sin_BTR: np.ndarray,
    visible_BTS: np.ndarray,
) -> np.ndarray:
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    B, T, D = x_BTD.shape
    linear = partial(_linear, read, bias=config.attention_bias)
    q_BTNH = linear("self_attn.q_proj", x_BTD, N * H).reshape(B, T, N, H)
    k_BSKH = linear("self_attn.k_proj", x_BTD, K * H).reshape(B, T, K, H)
    v_BSKH = linear("self_attn.v_proj", x_BTD, K * H).reshape(B, T, K, H)
    q_BTNH = rotate(_rms_norm(q_BTNH, read("self_attn.q_norm.weight", H), config.rms_norm_eps), cos_BTR, sin_BTR)
    k_BSKH = rotate(_rms_norm(k_BSKH, read("self_attn.k_norm.weight", H), config.rms_norm_eps), cos_BTR, sin_BTR)
    # query heads K-major: head n reads key/value head n // G
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BK1HS = k_BSKH.transpose(0, 2, 3, 1)[:, :, None]
    v_BK1SH = v_BSKH.transpose(0, 2, 1, 3)[:, :, None]
    scores_BKGTS = np.where(visible_BTS[:, None, None], q_BKGTH @ k_BK1HS * H**-0.5, -np.inf)
    mixed_BKGTH = _softmax(scores_BKGTS) @ v_BK1SH
    return linear("self_attn.o_proj", mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N * H), D)


def _visible(mask_BT: np.ndarray, window: int | None) -> np.ndarray:
    """Which key each query sees: real, not later, and at most ``window`` back, itself included; bool [B, T, S]."""
    steps = np.arange(mask_BT.shape[1])
    back_TS = steps[:, None] - steps[None, :]
    seen_TS = (back_TS >= 0) & (back_TS < (len(steps) if window is None else window))
    seen_BTS = seen_TS & mask_BT[:, None, :]
    blind_BT1 = ~seen_BTS.any(axis=-1, keepdims=True)  # padding only; itself keeps its softmax finite
    return seen_BTS | (blind_BT1 & (back_TS == 0))


def _route(
    config: Qwen3MoeConfig, read: Read, x_BTD: np.ndarray, mask_BT: np.ndarray, replayed_BTX: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Router logits [B, T, E], experts [B, T, X] and their weights [B, T, X]."""
    logits_BTE = _linear(read, "mlp.gate", x_BTD, config.num_experts)
    probabilities_BTE = _softmax(logits_BTE)
    experts_BTX = np.argsort(-probabilities_BTE, axis=-1, kind="stable")[..., : config.num_experts_per_tok]
    if replayed_BTX is not None:
        experts_BTX = np.where(mask_BT[..., None], replayed_BTX, experts_BTX)
    weights_BTX = np.take_along_axis(probabilities_BTE, experts_BTX, axis=-1)
    if config.norm_topk_prob:
        weights_BTX = weights_BTX / weights_BTX.sum(axis=-1, keepdims=True)
    return logits_BTE, experts_BTX, weights_BTX


def _experts(
    config: Qwen3MoeConfig, read: Read, x_BTD: np.ndarray, experts_BTX: np.ndarray, weights_BTX: np.ndarray
) -> np.ndarray:
    out_BTD = np.zeros_like(x_BTD)
    for expert in np.unique(experts_BTX):
        row, step, slot = np.nonzero(experts_BTX == expert)
        y = _swiglu(read, f"mlp.experts.{expert}.", x_BTD[row, step], config.moe_intermediate_size)
        out_BTD[row, step] += weights_BTX[row, step, slot, None] * y  # a token names an expert once: no repeated index
    return out_BTD


def _swiglu(read: Read, prefix: str, x: np.ndarray, size: int) -> np.ndarray:
    gate, up = _linear(read, prefix + "gate_proj", x, size), _linear(read, prefix + "up_proj", x, size)
    return _linear(read, prefix + "down_proj", gate * _sigmoid(gate) * up, x.shape[-1])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(x))  # never overflows, and loses no digits on either side
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def _softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def _linear(read: Read, name: str, x: np.ndarray, size: int, *, bias: bool = False) -> np.ndarray:
    y = x @ read(name + ".weight", size, x.shape[-1]).T
    return y + read(name + ".bias", size) if bias else y


def _head(checkpoint: Checkpoint, config: Qwen3Config, x_BTD: np.ndarray) -> np.ndarray:
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    head_VD = stored(checkpoint, name, config.vocab_size, config.hidden_size)
    parts = [head_VD[start : start + HEAD_ROWS] for start in range(0, len(head_VD), HEAD_ROWS)]
    return np.concatenate([x_BTD @ part.astype(np.float64).T for part in parts], axis=-1)
