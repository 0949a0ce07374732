"""A source at its worst: pieces come in any order, in one buffer for all of them, which the next step overwrites.

What runai-model-streamer's own ring does with ``owned=False``, without the luck of a long ring.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np

from loaders.reading import memory
from loaders.reading.regions import Piece
from loaders.sources import LocalDirectory, OpenFile, PieceError

POISON = 0xA5


class Lending:
    """A session over local files; see ``loaders.sources.source.Session``."""

    def __init__(self, seed: int) -> None:
        self.stretch_bytes = memory.STAGING_BYTES  # all of it is lent memory
        self.num_stretches = 4
        self._rng = np.random.default_rng(seed)
        self._waiting: dict[int, tuple[OpenFile, int, int]] = {}
        self._count = 0
        self._lent = np.empty(0, np.uint8)

    def submit(self, file: OpenFile, position: int, pieces: Sequence[Piece]) -> int:
        self._count += 1
        self._waiting[self._count] = file, position, sum(piece.num_bytes for piece in pieces)
        return self._count

    def next(self) -> tuple[int, np.ndarray]:
        ticket = int(self._rng.choice(list(self._waiting)))
        file, position, num_bytes = self._waiting.pop(ticket)
        self._lent[:] = POISON
        if self._lent.size < num_bytes:
            self._lent = np.empty(num_bytes, np.uint8)
        try:
            file.read_into(self._lent[:num_bytes].data, position)
        except OSError as error:
            raise PieceError(str(error), ticket) from error
        return ticket, self._lent[:num_bytes]

    def close(self) -> None:
        self._lent[:] = POISON


@contextmanager
def lent(seed: int = 0) -> Iterator[None]:
    """Inside the block local checkpoints are streamed so."""
    with patch.object(LocalDirectory, "session", lambda self, total_bytes: Lending(seed)):
        yield
