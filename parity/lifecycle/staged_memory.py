"""Memory that bytes are read into, counted as long as anybody keeps it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from unittest.mock import patch

import numpy as np

from loaders import Checkpoint

_ALIGNMENT = 64


class StagedMemory:
    """Stands in for ``aligned_empty``, and counts what it gave and what is still held.

    Attributes:
        now: bytes held.
        most: the most that were held at once, since it was last set.
    """

    def __init__(self) -> None:
        self.now = self.most = 0

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        buffer = np.empty(num_bytes + _ALIGNMENT, np.uint8)
        self.now += num_bytes
        self.most = max(self.most, self.now)
        weakref.finalize(buffer, self._freed, num_bytes)
        start = -buffer.ctypes.data % _ALIGNMENT
        return buffer[start : start + num_bytes].view(dtype).reshape(shape)

    def start(self) -> int:
        """Forget the most; what is held now."""
        gc.collect()
        self.most = self.now
        return self.now

    def _freed(self, num_bytes: int) -> None:
        self.now -= num_bytes


@contextmanager
def counted() -> Iterator[StagedMemory]:
    """All that is read inside the block is read into counted memory."""
    memory = StagedMemory()
    with ExitStack() as stack:
        for name in ("loaders.checkpoint", "loaders.reading.scratch"):
            stack.enter_context(patch.object(import_module(name), "aligned_empty", memory))
        yield memory


def largest_layer(checkpoint: Checkpoint) -> int:
    """Bytes of the largest decoder layer, or of what lies outside of them."""
    layers: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        layer = ".".join(name.split(".")[:3])
        layers[layer] = layers.get(layer, 0) + info.num_bytes
    return max(layers.values())
