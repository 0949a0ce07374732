"""NVFP4 to the bit: e2m1 codes, two to a byte, an e4m3 scale for each 16 of them, a float32 scale for the tensor.

Two libraries write this format and round differently on the way. ModelOpt multiplies: w = code * block * global.
compressed-tensors divides (``divide=True`` here): w = code * (block / global). Each is followed operation by operation,
so the bytes are theirs. Layouts that kernels want are in ``loaders.quantization.nvfp4_layout``.

Source: nvidia-modelopt 0.47 ``NVFP4QTensor``; compressed-tensors 0.20 ``generate_gparam``, ``calculate_qparams``,
``quantize``, ``dequantize``, as llm-compressor 0.14 calls them. Checked against both in tests/loaders/test_nvfp4.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from loaders.quantization.schemes import BLOCK

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9  # the least positive one
_CHUNK = 1 << 14  # blocks handled together: 1 MB of float32, which a core's cache holds and NumPy is quick on
_ZERO_DIVIDED = 0.125  # what compressed-tensors writes where a block scale would be zero

_BFLOAT16, _E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
_E4M3_VALUES = np.arange(256, dtype=np.uint8).view(_E4M3).astype(np.float32)
_INTEGER = {np.dtype(np.float32): np.uint32, np.dtype(np.float16): np.uint16, _BFLOAT16: np.uint16}
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
# The two values of each byte, kept as one number of 8 bytes so that a lookup moves both. ModelOpt reads code 8 as +0.
_PAIRS_DIVIDED = np.stack([np.tile(_VALUES, 16), np.repeat(_VALUES, 16)], axis=-1).view(np.uint64)[:, 0]
_PAIRS = (_PAIRS_DIVIDED.view(np.float32) + np.float32(0)).view(np.uint64)
# Halfway between neighbours; the code is how many of them are passed. A tie goes to the even code.
_TIES_UP, _TIES_DOWN = np.array([0.75, 1.75, 3.5], np.float32), np.array([0.25, 1.25, 2.5, 5], np.float32)


@dataclass(frozen=True)
class NVFP4Tensor:
    """A quantised tensor [..., K], as a checkpoint holds it."""

    packed: np.ndarray  # uint8 [..., K/2]
    block_scale: np.ndarray  # e4m3 [..., K/16]
    global_scale: np.ndarray  # float32; one for all of it, or one for each of its first axes


def decode(codes: np.ndarray) -> np.ndarray:
    """float32 value of each code 0..15; code 8 is -0."""
    return _VALUES[codes]


def encode(values: np.ndarray) -> np.ndarray:
    """uint8 code of the nearest e2m1 value; float32 in; ties to the even code; beyond 6 stays 6.

    The sign is that of ``x < 0``: a negative that rounds to zero gives 8, while -0.0 gives 0.

    Raises:
        ValueError: a NaN, of which there is no code.
    """
    if np.isnan(values).any():
        raise ValueError("the values hold NaN, and e2m1 has none")
    return _codes(np.abs(values), values < 0)


def _codes(magnitude: np.ndarray, is_negative: np.ndarray) -> np.ndarray:
    codes, is_passed = np.left_shift(is_negative.view(np.uint8), 3), np.empty(magnitude.shape, bool)
    for ties, passes in ((_TIES_UP, np.greater_equal), (_TIES_DOWN, np.greater)):
        for tie in ties:
            codes += passes(magnitude, tie, out=is_passed).view(np.uint8)
    return codes


def pack(codes: np.ndarray) -> np.ndarray:
    """Two codes to a byte, the even index in the low half: uint8 [..., K] to [..., K/2].

    Raises:
        ValueError: an odd K.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"codes have shape {codes.shape}: the last axis is odd, and two codes go in a byte")
    return codes[..., 0::2] | np.left_shift(codes[..., 1::2], 4)


def unpack(packed: np.ndarray) -> np.ndarray:
    """Inverse of ``pack``: uint8 [..., K/2] to codes [..., K]."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def global_scale(amax: float | np.ndarray) -> np.ndarray:
    """ModelOpt's scale of a tensor whose largest magnitude is ``amax``: amax / (6 * 448), float32, shaped as ``amax``.

    Where that is zero (amax under 1.9e-42; zero above all) it is 1.0: ModelOpt divides by zero there and writes NaN
    scales, or codes of 7 throughout. With 1.0 such a tensor is all zeros.

    Raises:
        ValueError: ``amax`` is negative, infinite or NaN.
    """
    scale = _amax(amax, np.dtype(np.float32)) / np.float32(E2M1_MAX * E4M3_MAX)
    return np.where(scale > 0, scale, np.float32(1))


def global_divisor(amax: float | np.ndarray, dtype: np.dtype | type = np.float32) -> np.ndarray:
    """compressed-tensors' divisor of a tensor of ``dtype``: (1 / amax) * 2688, float32 [1] or shaped as ``amax``.

    Both steps round to the tensor's own dtype, so for bfloat16 weights it is a bfloat16 number and not the reciprocal
    of ``global_scale``. What overflows is 1.0, as there: amax zero, and in float16 any amax under 0.041.

    Raises:
        ValueError: ``amax`` is negative, infinite or NaN.
    """
    dtype = np.dtype(dtype)
    tiny = ml_dtypes.finfo(dtype).tiny
    with np.errstate(over="ignore"):
        inverse = (1 / np.maximum(_amax(amax, dtype), tiny).astype(np.float32)).astype(dtype)
        divisor = (inverse.astype(np.float32) * np.float32(E2M1_MAX * E4M3_MAX)).astype(dtype).astype(np.float32)
    return np.atleast_1d(np.where(np.isfinite(divisor), divisor, np.float32(1)))


def _amax(amax: float | np.ndarray, dtype: np.dtype) -> np.ndarray:
    wide = np.asarray(amax).astype(np.float64)
    if not ((wide >= 0) & (wide <= float(ml_dtypes.finfo(dtype).max))).all():
        raise ValueError(f"amax is {amax}, expected a number that is not negative and finite in {dtype}")
    return wide.astype(dtype)


def block_scales(weight: np.ndarray, scale: float | np.ndarray, *, divide: bool = False) -> np.ndarray:
    """The scale of every block: e4m3 [..., K/16].

    ModelOpt: amax / (6 * scale), a zero block 1.0, then kept within [2**-9, 448]. compressed-tensors:
    scale * (amax / 6) with the quotient in the weight's dtype, at most 448, and 0.125 where that rounds to zero.

    Args:
        weight: float32, bfloat16 or float16 [..., K].
        scale: as ``quantize`` returns it.
        divide: in compressed-tensors' convention.
    Raises:
        ValueError: as ``quantize``; a scale that is not positive.
    """
    bits_Q16 = _bits(weight)
    per_scale, scale_S = _scales(_given(scale), weight.shape)
    scale_Q = np.empty(len(bits_Q16), _E4M3)
    for part in _parts(len(bits_Q16)):
        magnitude_16q = bits_Q16[part].T & _mask(weight.dtype)
        amax_q = _block_amax(magnitude_16q, weight.dtype)
        scale_Q[part] = _block_scales(amax_q, _of_blocks(scale_S, per_scale, part), divide)
    return scale_Q.reshape(*weight.shape[:-1], weight.shape[-1] // BLOCK)


def quantize(
    weight: np.ndarray,
    *,
    amax: float | np.ndarray | None = None,
    divide: bool = False,
    threads: int = 1,
    out: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
) -> NVFP4Tensor:
    """Quantise in the bits of ModelOpt, or with ``divide`` in those of compressed-tensors.

    Beside the result it takes memory for a few thousand blocks.

    Args:
        weight: float32, bfloat16 or float16 [..., K]; contiguous, else it is copied.
        amax: largest magnitude that the global scale is for: of layers that share it, or from calibration; an array
            whose shape is that of ``weight``'s first axes gives each part its own. None: the tensor's own.
        divide: in compressed-tensors' convention.
        threads: NumPy leaves the interpreter free, so two are nearly twice as fast.
        out: contiguous memory for codes and block scales, where they are wanted somewhere.
    Raises:
        ValueError: K is no multiple of 16; another dtype; NaN or infinity.
    """
    bits_Q16 = _bits(weight)
    if amax is None:
        amax = _largest(bits_Q16, weight.dtype)
    found = global_divisor(amax, weight.dtype) if divide else global_scale(amax)
    per_scale, scale_S = _scales(found, weight.shape)
    *leading, K = weight.shape
    packed = np.empty((*leading, K // 2), np.uint8) if out[0] is None else out[0]
    block_scale = np.empty((*leading, K // BLOCK), _E4M3) if out[1] is None else out[1]
    packed_Q8, scale_Q = packed.reshape(-1, BLOCK // 2), block_scale.reshape(-1)

    def one(part: slice) -> None:
        codes_16q, scale_Q[part] = _quantize(bits_Q16[part], weight.dtype, _of_blocks(scale_S, per_scale, part), divide)
        packed_Q8[part] = (codes_16q[0::2] | np.left_shift(codes_16q[1::2], 4)).T

    _run(one, len(bits_Q16), threads)
    return NVFP4Tensor(packed, block_scale, found)


def quantize_activations(
    x: np.ndarray, input_scale: float | np.ndarray, *, divide: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and block scales of activations whose global scale was calibrated.

    In float32 the two conventions hardly ever differ. For 16-bit activations compressed-tensors rounds amax / 6 to
    their dtype, and up to one in 25 bfloat16 blocks has another scale. Kernels divide in float32 whatever came in.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        input_scale: ``input_scale`` of ModelOpt, or with ``divide`` compressed-tensors' ``input_global_scale``.
        divide: in compressed-tensors' convention.
    Returns:
        Codes, uint8 [..., K], not packed; and block scales, e4m3 [..., K/16].
    Raises:
        ValueError: as ``quantize``; a scale that is not positive.
    """
    bits_Q16 = _bits(x)
    per_scale, scale_S = _scales(_given(input_scale), x.shape)
    codes_Q16, scale_Q = np.empty(bits_Q16.shape, np.uint8), np.empty(len(bits_Q16), _E4M3)
    for part in _parts(len(bits_Q16)):
        codes_16q, scale_Q[part] = _quantize(bits_Q16[part], x.dtype, _of_blocks(scale_S, per_scale, part), divide)
        codes_Q16[part] = codes_16q.T
    return codes_Q16.reshape(x.shape), scale_Q.reshape(*x.shape[:-1], x.shape[-1] // BLOCK)


def dequantize(
    packed: np.ndarray, block_scale: np.ndarray, global_scale: float | np.ndarray, *, divide: bool = False
) -> np.ndarray:
    """Expand to float32: code * (block scale * global scale), or code * (block scale / divisor).

    Args:
        packed: uint8 [..., K/2].
        block_scale: e4m3 [..., K/16].
        global_scale: float32; one number, or an array whose shape, without ones at its end, is that of the first axes:
            [E] and [E, 1, 1] give each of E matrices its own, [E, 2] each half of them.
        divide: ``global_scale`` is compressed-tensors' divisor.
    Returns:
        float32 [..., K].
    Raises:
        ValueError: shapes or dtypes that do not go together.
    """
    want = (*packed.shape[:-1], packed.shape[-1] * 2 // BLOCK)
    if packed.dtype != np.uint8 or packed.shape[-1] % (BLOCK // 2):
        raise ValueError(
            f"packed is {packed.dtype} {packed.shape}, expected uint8 with K/2 columns, K a multiple of 16"
        )
    if block_scale.dtype != _E4M3 or block_scale.shape != want:
        raise ValueError(f"block_scale is {block_scale.dtype} {block_scale.shape}, expected float8_e4m3fn {want}")
    packed_Q8, scale_Q = packed.reshape(-1, BLOCK // 2), block_scale.reshape(-1)
    per_scale, scale_S = _scales(global_scale, packed.shape, block_bytes=BLOCK // 2)
    out_Q16, pairs = np.empty((len(scale_Q), BLOCK), np.float32), _PAIRS_DIVIDED if divide else _PAIRS
    for part in _parts(len(scale_Q)):
        step_q = _step(scale_Q[part], _of_blocks(scale_S, per_scale, part), divide)
        np.multiply(pairs[packed_Q8[part]].view(np.float32), step_q[:, None], out=out_Q16[part])
    return out_Q16.reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def _quantize(bits_q16: np.ndarray, dtype: np.dtype, scale: np.ndarray, divide: bool) -> tuple[np.ndarray, np.ndarray]:
    """Codes [16, q] and block scales [q]: with blocks along the last axis every operation is on long rows."""
    bits_16q = np.ascontiguousarray(bits_q16.T)
    magnitude_16q = bits_16q & _mask(dtype)
    scale_q = _block_scales(_block_amax(magnitude_16q, dtype), scale, divide)
    steps_16q = magnitude_16q.view(dtype).astype(np.float32)
    with np.errstate(over="ignore"):  # beyond the largest code, like all above 6
        steps_16q /= _step(scale_q, scale, divide)
    is_negative_16q = bits_16q != magnitude_16q
    is_negative_16q &= steps_16q > 0
    return _codes(steps_16q, is_negative_16q), scale_q


def _step(scale_q: np.ndarray, scale: np.ndarray, divide: bool) -> np.ndarray:
    wide_q = _E4M3_VALUES[scale_q.view(np.uint8)]
    return wide_q / scale if divide else wide_q * scale


def _block_amax(magnitude_16q: np.ndarray, dtype: np.dtype) -> np.ndarray:
    bits_q = magnitude_16q.max(axis=0)  # magnitudes are in order as integers too, and what is not finite comes last
    if (bits_q >= np.array(np.inf, dtype).view(bits_q.dtype)).any():
        raise ValueError("the tensor holds NaN or infinity, and NVFP4 has neither")
    return bits_q.view(dtype)


def _block_scales(amax_q: np.ndarray, scale: np.ndarray, divide: bool) -> np.ndarray:
    most_q = amax_q.astype(np.float32)
    with np.errstate(over="ignore"):  # 448 is the most in any case
        if divide:
            most_q = scale * (most_q / np.float32(E2M1_MAX)).astype(amax_q.dtype).astype(np.float32)
        else:
            most_q /= np.float32(E2M1_MAX) * scale
            most_q[most_q == 0] = 1
            np.maximum(most_q, np.float32(E4M3_MIN), out=most_q)
    scale_q = np.minimum(most_q, np.float32(E4M3_MAX)).astype(_E4M3)
    scale_q[scale_q.view(np.uint8) == 0] = _ZERO_DIVIDED
    return scale_q


def _bits(weight: np.ndarray) -> np.ndarray:
    """The tensor as blocks of integers, [Q, 16]."""
    if weight.dtype not in _INTEGER:
        raise ValueError(f"a tensor of {weight.dtype} cannot be quantised, expected float32, bfloat16 or float16")
    if not weight.ndim or weight.shape[-1] % BLOCK:
        raise ValueError(f"a tensor of shape {weight.shape} cannot be quantised: K is no multiple of {BLOCK}")
    return np.ascontiguousarray(weight).view(_INTEGER[weight.dtype]).reshape(-1, BLOCK)


def _mask(dtype: np.dtype) -> np.unsignedinteger:
    return np.iinfo(_INTEGER[dtype]).max >> _INTEGER[dtype](1)


def _largest(bits_Q16: np.ndarray, dtype: np.dtype) -> np.ndarray:
    most = max((int((bits_Q16[part] & _mask(dtype)).max()) for part in _parts(len(bits_Q16))), default=0)
    return _block_amax(np.array([[most]], _INTEGER[dtype]), dtype)[0]


def _scales(scale: float | np.ndarray, shape: tuple[int, ...], block_bytes: int = BLOCK) -> tuple[int, np.ndarray]:
    """How many blocks in a row share a global scale, and the scales, [S]."""
    array = np.asarray(scale, np.float32)
    own = array.shape
    while own and own[-1] == 1:
        own = own[:-1]
    if own != shape[: len(own)] or len(own) >= len(shape):
        raise ValueError(
            f"global scale of shape {array.shape} for a tensor of shape {shape}: expected one, or one for"
            " each of its first axes"
        )
    return int(np.prod(shape[len(own) :])) // block_bytes, array.reshape(-1)


def _given(scale: float | np.ndarray) -> np.ndarray:
    array = np.asarray(scale, np.float32)
    if not (np.isfinite(array) & (array > 0)).all():
        raise ValueError(f"global scale is {scale}, expected a finite number above zero")
    return array


def _of_blocks(scale_S: np.ndarray, per_scale: int, part: slice) -> np.ndarray:
    return scale_S if len(scale_S) == 1 else scale_S[np.arange(part.start, part.stop) // per_scale]


def _parts(num_blocks: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, num_blocks)) for start in range(0, num_blocks, _CHUNK))


def _run(work: Callable[[slice], None], num_blocks: int, threads: int) -> None:
    if threads == 1 or num_blocks <= _CHUNK:
        for part in _parts(num_blocks):
            work(part)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, _parts(num_blocks)):
            pass
