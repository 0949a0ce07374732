"""Quantised weights in float64, every value exact: what the codes and scales of a checkpoint say.

Read from the tensors alone, so that it shares no opinion on config.json with either backend. Source: nvidia-modelopt
0.47 ``NVFP4QTensor.dequantize``, compressed-tensors 0.20 ``nvfp4-pack-quantized``.
"""

from __future__ import annotations

import numpy as np

from loaders import Checkpoint

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
PER_SCALE = 16


def widened(checkpoint: Checkpoint, module: str) -> np.ndarray | None:
    """The weight [N, K] of a linear layer in float64; None where it is not quantised."""
    info = checkpoint.tensors.get(f"{module}.weight")
    if f"{module}.weight_packed" in checkpoint.tensors:
        return _codes(checkpoint, f"{module}.weight_packed", module) / _scalar(
            checkpoint, f"{module}.weight_global_scale"
        )
    if info is None or info.dtype not in ("U8", "F8_E4M3"):
        return None
    if info.dtype == "U8":
        return _codes(checkpoint, f"{module}.weight", module) * _scalar(checkpoint, f"{module}.weight_scale_2")
    return checkpoint.read(f"{module}.weight").astype(np.float64) * _scalar(checkpoint, f"{module}.weight_scale")


def _codes(checkpoint: Checkpoint, name: str, module: str) -> np.ndarray:
    """Codes times the scales of their blocks."""
    packed_NJ = checkpoint.read(name)
    codes_NJ2 = np.stack([packed_NJ & 0xF, packed_NJ >> 4], axis=-1)  # the low half of a byte comes first
    numbers = np.where(codes_NJ2 & 8, -1.0, 1.0) * E2M1[codes_NJ2 & 7]
    scale_NQ = checkpoint.read(f"{module}.weight_scale").astype(np.float64)
    return (numbers.reshape(*scale_NQ.shape, PER_SCALE) * scale_NQ[..., None]).reshape(len(packed_NJ), -1)


def _scalar(checkpoint: Checkpoint, name: str) -> float:
    return float(checkpoint.read(name).reshape(()))
