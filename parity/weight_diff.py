"""How far two tensors of one name are apart, and whether the difference is a well-known accident.

What is looked for is what loaders and converters really do wrong, as far as it is cheap to see: transposed, negated,
halves or rows in another order, nibbles exchanged, scaled, 1 + w for w, rounded to another dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from loaders import dtypes

CHUNK = 1 << 20  # elements widened to float64 at a time


@dataclass(frozen=True)
class TensorDiff:
    """Two tensors whose bits are not the same.

    Attributes:
        elements: how many differ; size: of how many.
        first: index of the first that does; values: of both there.
        max_abs, rel_l2: largest distance, and that of the whole over the size of b; None of codes and other integers,
            whose distance means nothing, and where something is not finite.
        accident: what turns one into the other, None when it is none of those known.
    """

    elements: int
    size: int
    first: tuple[int, ...]
    values: tuple[float, float]
    max_abs: float | None
    rel_l2: float | None
    accident: str | None = None

    def __str__(self) -> str:
        parts = [f"{self.elements} of {self.size} elements"]
        if self.max_abs is not None and self.rel_l2 is not None:
            parts.append(f"max abs {self.max_abs:.3g}, rel L2 {self.rel_l2:.3g}")
        parts.append(f"first at {list(self.first)}: {self.values[0]:.6g} against {self.values[1]:.6g}")
        return ", ".join(parts)


def find_accident(a: np.ndarray, b: np.ndarray) -> str | None:
    """What was done to ``b`` that gives ``a``, bit for bit where it is a matter of order; None when nothing known.

    Any shapes and dtypes; two that are equal have no accident.
    """
    if a.dtype != b.dtype:
        return _rounded(a, b)
    bits_a, bits_b = _bits(a), _bits(b)
    if a.ndim >= 2 and a.shape == (*b.shape[:-2], b.shape[-1], b.shape[-2]) and _same(bits_a, bits_b.swapaxes(-1, -2)):
        return "transposed"
    if a.shape != b.shape:
        return (
            "the same values in another shape" if a.size == b.size and _same(bits_a.ravel(), bits_b.ravel()) else None
        )
    return _reordered(bits_a, bits_b, a.dtype) or (_arithmetic(a, b) if is_float(a) else None)


def diff_tensors(a: np.ndarray, b: np.ndarray) -> TensorDiff | None:
    """Hold two tensors of one shape and dtype against each other; None when their bits are the same."""
    assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{a.shape=} {b.shape=} {a.dtype=} {b.dtype=}"
    different = _bits(a).ravel() != _bits(b).ravel()
    if not different.any():
        return None
    first = np.unravel_index(int(np.argmax(different)), a.shape)
    max_abs = rel_l2 = None
    if is_float(a):
        largest = over = under = 0.0
        for x, y in _chunks(a, b):
            with np.errstate(invalid="ignore", over="ignore"):  # inf - inf: told as not finite
                gap = x - y
                largest = max(largest, float(np.abs(gap).max()))
                over, under = over + float(gap @ gap), under + float(y @ y)
        if math.isfinite(over) and math.isfinite(under):
            max_abs = largest
            rel_l2 = math.sqrt(over / under) if under else math.inf
    return TensorDiff(
        elements=int(different.sum()),
        size=a.size,
        first=tuple(map(int, first)),
        values=(float(a[first]), float(b[first])),
        max_abs=max_abs,
        rel_l2=rel_l2,
        accident=find_accident(a, b),
    )


def is_float(array: np.ndarray) -> bool:
    """Whether it is of a float dtype, NumPy's own or ml_dtypes'."""
    try:
        ml_dtypes.finfo(array.dtype)
    except ValueError:
        return False
    return True


def is_constant(array: np.ndarray) -> bool:
    """One value throughout, as in norms that were never trained: equal to such a tensor is no evidence."""
    bits = _bits(array).ravel()
    return array.size < 2 or bool((bits == bits[0]).all())


def _bits(array: np.ndarray) -> np.ndarray:
    """The same shape as unsigned integers, so that NaN equals itself and -0 is not 0."""
    size = array.dtype.itemsize
    return array if size not in (1, 2, 4, 8) else array.view(np.dtype(f"u{size}"))


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool((a == b).all())


def _chunks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, a.size, CHUNK):
        yield flat_a[start : start + CHUNK].astype(np.float64), flat_b[start : start + CHUNK].astype(np.float64)


def _reordered(bits_a: np.ndarray, bits_b: np.ndarray, dtype: np.dtype) -> str | None:
    """The same bits in other places."""
    for axis, name in ((0, "first"), (-1, "last")):
        half = bits_a.shape[axis] // 2 if bits_a.ndim else 0
        if half and bits_a.shape[axis] % 2 == 0 and _same(bits_a, np.roll(bits_b, half, axis)):
            return f"halves of the {name} axis swapped"
    if dtype == np.uint8 and _same(bits_a, (bits_b >> 4) | (bits_b << 4)):
        return "the two codes of each byte swapped"
    if (
        bits_a.ndim == 2
        and _same(np.sort(bits_a[:, 0]), np.sort(bits_b[:, 0]))
        and _same(*map(_sorted_rows, (bits_a, bits_b)))
    ):
        return "the same rows in another order"
    return None


def _sorted_rows(matrix: np.ndarray) -> np.ndarray:
    rows = np.ascontiguousarray(matrix)
    return np.sort(rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).ravel())


def _arithmetic(a: np.ndarray, b: np.ndarray) -> str | None:
    """a = -b, a = b + 1, a = c * b or nothing but zeros, as exactly as the dtype can say it."""
    u = float(ml_dtypes.finfo(a.dtype).eps)
    aa = ab = bb = 0.0
    low, high = math.inf, -math.inf
    for x, y in _chunks(a, b):
        with np.errstate(invalid="ignore", over="ignore"):
            aa, ab, bb = aa + float(x @ x), ab + float(x @ y), bb + float(y @ y)
            gap = x - y
        low, high = min(low, float(gap.min())), max(high, float(gap.max()))
    if a.size < 2 or not all(map(math.isfinite, (aa, ab, bb, low, high))):
        return None  # of one number anything is a multiple
    if not aa or not bb:
        return "all zeros" if not aa else "all zeros in the second"
    for shift in (1.0, -1.0):
        if max(abs(low - shift), abs(high - shift)) <= 2 * u:
            return "1 + the second" if shift > 0 else "the second is 1 + the first"
    scale = ab / bb
    rest = math.sqrt(max(0.0, aa - ab * scale) / aa)  # what is left of a beside a multiple of b
    if rest > 2 * u + 1e-7 or abs(scale - 1) <= 2 * u:
        return None
    return "negated" if abs(scale + 1) <= 2 * u else f"{scale:.4g} times the second"


def _rounded(a: np.ndarray, b: np.ndarray) -> str | None:
    """One is the other in another dtype."""
    if a.shape != b.shape or not (is_float(a) and is_float(b)):
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        if a.dtype.itemsize <= b.dtype.itemsize and _same(_bits(b.astype(a.dtype)), _bits(a)):
            return f"the second rounded to {dtypes.from_numpy(a.dtype)}"
        if a.dtype.itemsize >= b.dtype.itemsize and _same(_bits(a.astype(b.dtype)), _bits(b)):
            return f"the second is the first rounded to {dtypes.from_numpy(b.dtype)}"
    return None
