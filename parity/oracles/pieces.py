"""What the families' oracles are made of: float64 NumPy, from the equations. Letters: docs/glossary.md."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from parity.oracles.run import Weights


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x)."""
    small = np.exp(-np.abs(x))  # never overflows, and loses no digits on either side
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def silu(x: np.ndarray) -> np.ndarray:
    """x times its sigmoid."""
    return x * sigmoid(x)


def relu(x: np.ndarray) -> np.ndarray:
    """x where it is positive, else 0."""
    return np.maximum(x, 0.0)


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the normal distribution's share below it. Source: arXiv:1606.08415, section 2."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The approximation of GELU by tanh. Source: arXiv:1606.08415, section 2."""
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def capped(x: np.ndarray, cap: float | None) -> np.ndarray:
    """Bent to stay within ``cap``; None for no cap."""
    return x if cap is None else cap * np.tanh(x / cap)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """``weight`` times x over its root mean square along the last axis."""
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def linear(
    read: Weights, name: str, x: np.ndarray, size: int, *, bias: bool = False, tap: str | None = None
) -> np.ndarray:
    """The linear layer ``name`` with ``size`` outputs; ``tap``: what its result is called, where not as the layer."""
    y = x @ read.matrix(name, size, x.shape[-1], x).T
    return read.tap(tap or name, y + read(name + ".bias", size) if bias else y)


def visible(mask_BT: np.ndarray, window: int | None) -> np.ndarray:
    """Which key each query sees: real, not later, and at most ``window`` back, itself included; bool [B, T, S]."""
    steps = np.arange(mask_BT.shape[1])
    back_TS = steps[:, None] - steps[None, :]
    seen_TS = (back_TS >= 0) & (back_TS < (len(steps) if window is None else window))
    seen_BTS = seen_TS & mask_BT[:, None, :]
    blind_BT1 = ~seen_BTS.any(axis=-1, keepdims=True)  # padding only; itself keeps its softmax finite
    return seen_BTS | (blind_BT1 & (back_TS == 0))


def attend(
    q_BTNH: np.ndarray,
    k_BSKH: np.ndarray,
    v_BSKH: np.ndarray,
    visible_BTS: np.ndarray,
    *,
    scale: float,
    cap: float | None = None,
) -> np.ndarray:
    """Softmax attention with grouped heads, [B, T, N*H]."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    # query heads K-major: head n reads key/value head n // G
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BK1HS = k_BSKH.transpose(0, 2, 3, 1)[:, :, None]
    v_BK1SH = v_BSKH.transpose(0, 2, 1, 3)[:, :, None]
    scores_BKGTS = capped(q_BKGTH @ k_BK1HS * scale, cap)
    mixed_BKGTH = softmax(np.where(visible_BTS[:, None, None], scores_BKGTS, -np.inf)) @ v_BK1SH
    return mixed_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N * H)


def swiglu(read: Weights, prefix: str, x: np.ndarray, size: int) -> np.ndarray:
    """The gated MLP of width ``size`` under ``prefix``."""
    gate, up = linear(read, prefix + "gate_proj", x, size), linear(read, prefix + "up_proj", x, size)
    product = read.tap(prefix + "product", silu(gate) * up)
    return linear(read, prefix + "down_proj", product, x.shape[-1])


def route(
    config: Any, read: Weights, x_BTD: np.ndarray, mask_BT: np.ndarray, replayed_BTX: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Router logits [B, T, E], experts [B, T, X] and their weights [B, T, X]."""
    logits_BTE = linear(read, "mlp.gate", x_BTD, config.num_experts, tap="mlp.gate.logits")
    probabilities_BTE = softmax(logits_BTE)
    experts_BTX = np.argsort(-probabilities_BTE, axis=-1, kind="stable")[..., : config.num_experts_per_tok]
    if replayed_BTX is not None:
        experts_BTX = np.where(mask_BT[..., None], replayed_BTX, experts_BTX)
    experts_BTX = read.tap("mlp.gate", experts_BTX)
    weights_BTX = np.take_along_axis(probabilities_BTE, experts_BTX, axis=-1)
    if config.norm_topk_prob:
        weights_BTX = weights_BTX / weights_BTX.sum(axis=-1, keepdims=True)
    return logits_BTE, experts_BTX, read.tap("mlp.gate.weights", weights_BTX)


def experts(
    config: Any, read: Weights, x_BTD: np.ndarray, experts_BTX: np.ndarray, weights_BTX: np.ndarray
) -> np.ndarray:
    """Every token's experts, weighted and summed; stored one by one, or all in one tensor, either way round."""
    E, M, D = config.num_experts, config.moe_intermediate_size, x_BTD.shape[-1]
    fused, alone = read.under("mlp.experts."), replace(read, taps=None)
    # of the two shapes one may fit both ways, never both
    is_turned = (fused.shape("gate_up_proj"), fused.shape("down_proj")) == ((E, D, 2 * M), (E, M, D))
    shapes = ((E, D, 2 * M), (E, M, D)) if is_turned else ((E, 2 * M, D), (E, D, M))
    gate_BTXM, up_BTXM = (np.empty((*experts_BTX.shape, M)) for _ in range(2))
    out_BTXD = np.empty((*experts_BTX.shape, D))
    places = {expert: np.nonzero(experts_BTX == expert) for expert in np.unique(experts_BTX)}
    for expert, place in places.items():
        x = x_BTD[place[:2]]
        if fused.has("gate_up_proj"):  # outputs of the gate first
            if fused.saw:
                fused.saw(f"{fused.prefix}{expert}.gate_proj", x)
                fused.saw(f"{fused.prefix}{expert}.up_proj", x)
            gate_up = x @ _expert(fused, expert, ("gate", "up"), "gate_up_proj", shapes[0], is_turned).T
            gate_BTXM[place], up_BTXM[place] = gate_up[:, :M], gate_up[:, M:]
        else:
            gate_BTXM[place] = linear(alone, f"mlp.experts.{expert}.gate_proj", x, M)
            up_BTXM[place] = linear(alone, f"mlp.experts.{expert}.up_proj", x, M)
    gate_BTXM, up_BTXM = fused.tap("gate_proj", gate_BTXM), fused.tap("up_proj", up_BTXM)
    inner_BTXM = fused.tap("product", silu(gate_BTXM) * up_BTXM)
    for expert, place in places.items():
        inner = inner_BTXM[place]
        if fused.has("down_proj"):
            if fused.saw:
                fused.saw(f"{fused.prefix}{expert}.down_proj", inner)
            out_BTXD[place] = inner @ _expert(fused, expert, ("down",), "down_proj", shapes[1], is_turned).T
        else:
            out_BTXD[place] = linear(alone, f"mlp.experts.{expert}.down_proj", inner, D)
    out_BTXD = fused.tap("down_proj", out_BTXD)
    return (weights_BTX[..., None] * out_BTXD).sum(axis=2)


def _expert(
    read: Weights, expert: int, parts: tuple[str, ...], stack: str, shape: tuple[int, ...], is_turned: bool
) -> np.ndarray:
    """One expert's matrix [out, in] out of a stack, with what an adapter adds to its parts, one above the other."""
    base = read.stored(stack, *shape)[expert].astype(np.float64)
    base = base.T if is_turned else base
    if read.adapted is None:
        return base
    deltas = [read.adapted.delta(f"{read.prefix}{expert}.{part}_proj") for part in parts]
    return base + np.concatenate([delta for delta in deltas if delta is not None]) if deltas[0] is not None else base
