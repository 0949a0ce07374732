"""What kernels of attention share: when they are left out, and how heads and rows are cut over a mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from jax.sharding import Mesh

from loaders.axes import LOGICAL_AXES, Cut, axes_of, cut_of, head_cuts

LANES = 128  # of a vector register: what blocks and heads have to be multiples of, and the innermost axis is padded to

_are_left_to_xla: ContextVar[bool] = ContextVar("are_left_to_xla", default=False)


@contextmanager
def left_to_xla() -> Iterator[None]:
    """Inside no program takes a kernel: the caller places arrays, and XLA does not partition kernels on its own."""
    token = _are_left_to_xla.set(True)
    try:
        yield
    finally:
        _are_left_to_xla.reset(token)


def are_left_to_xla() -> bool:
    return _are_left_to_xla.get()


class HeadCuts(NamedTuple):
    """Mesh axes that cut rows, query heads, and heads of keys and values; ``group`` queries ask for one key.

    ``inner`` cut queries alone: devices along them have the same keys.
    """

    rows: Cut
    by_query: Cut
    by_key: Cut
    inner: tuple[str, ...]
    group: int


def cuts_of(mesh: Mesh | None, num_rows: int, num_heads: int, num_kv_heads: int) -> HeadCuts:
    group = num_heads // num_kv_heads
    if mesh is None:
        return HeadCuts(None, None, None, (), group)
    by_query, by_key = head_cuts(mesh.shape, num_heads, num_kv_heads)
    inner = axes_of(by_query)[len(axes_of(by_key)) :]
    return HeadCuts(cut_of(mesh.shape, LOGICAL_AXES["B"], num_rows), by_query, by_key, inner, group)
