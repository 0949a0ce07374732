"""Tensors of a checkpoint, read by a session of its source: each as soon as its last piece is in place.

What lies side by side in a file is read at once, across the bounds of tensors. Nothing that a source lends is kept:
every piece is copied to its place before the next is asked for, so a tensor is memory of the caller's or of its own.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from loaders import memory
from loaders.errors import CheckpointError
from loaders.memory import as_bools, fill, pieces
from loaders.sources import OpenFile, PieceError, Session

if TYPE_CHECKING:
    from loaders.checkpoint import Checkpoint

WINDOW_BYTES = 64 << 20  # on its way at any moment
MOST_STRETCHES = 64  # likewise
MOST_PIECES = 256  # in one stretch; a system takes 1024 buffers at once


@dataclass
class _Tensor:
    """One that was begun: not all of its pieces are in place."""

    name: str
    out: np.ndarray
    cost: int  # bytes of our own
    waiting: deque[tuple[int, np.ndarray]]  # pieces that were not asked for yet, and where in the file they begin
    num_flying: int = 0


@dataclass
class _Stretch:
    """Pieces of one tensor or several that follow each other in a file."""

    file: str
    position: int
    parts: list[tuple[_Tensor, np.ndarray]] = field(default_factory=list)
    num_bytes: int = 0

    def takes(self, file: str, position: int, piece: np.ndarray) -> bool:
        is_next = (file, position) == (self.file, self.position + self.num_bytes)
        return is_next and len(self.parts) < MOST_PIECES and self.num_bytes + piece.nbytes <= memory.STAGING_BYTES


class Arrivals:
    """One stream.

    Args:
        checkpoint: what is read.
        session: of its source; closed at the end.
        wanted: names, in file order.
        into: see ``Checkpoint.stream``.
        budget: bytes of tensors that may be held, destinations that were given apart.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        session: Session,
        wanted: list[str],
        into: Callable[[str], np.ndarray | None] | None,
        budget: int,
    ) -> None:
        self._checkpoint, self._session, self._into, self._budget = checkpoint, session, into, budget
        self._window = min(WINDOW_BYTES, budget)
        self._waiting = deque(wanted)
        self._begun: _Tensor | None = None  # whose pieces are being asked for
        self._flying: dict[int, _Stretch] = {}
        self._done: deque[_Tensor] = deque()
        self._held = self._in_flight = 0
        self._files: dict[str, OpenFile] = {}
        self._left = Counter(checkpoint.tensors[name].file for name in wanted)

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        try:
            with closing(self._session):
                while self._waiting or self._begun or self._flying or self._done:
                    self._submit()
                    if not self._done:
                        self._take()
                        continue
                    tensor = self._done.popleft()
                    self._finish(tensor)
                    name, out, cost = tensor.name, tensor.out, tensor.cost
                    del tensor
                    yield name, out
                    del out
                    self._held -= cost
        finally:
            for file in self._files.values():
                file.close()

    def _submit(self) -> None:
        """Ask for as many stretches as there is room for; a tensor's pieces all before the next one's."""
        while len(self._flying) < MOST_STRETCHES and not (self._flying and self._in_flight >= self._window):
            stretch = self._next_stretch()
            if stretch is None:
                return
            self._ask_for(stretch)

    def _ask_for(self, stretch: _Stretch) -> None:
        try:
            file, pieces = self._file(stretch.file), [piece for _, piece in stretch.parts]
            ticket = self._session.submit(file, stretch.position, pieces)
        except OSError as error:
            raise self._failure(stretch, error) from error
        self._flying[ticket] = stretch
        self._in_flight += stretch.num_bytes

    def _next_stretch(self) -> _Stretch | None:
        """The next pieces that lie side by side in one file; None: there are none, or no room for them."""
        stretch = None
        while self._begun is not None or self._begin():
            tensor = self._begun
            assert tensor is not None
            position, piece = tensor.waiting[0]
            file = self._checkpoint.tensors[tensor.name].file
            if stretch is None:
                stretch = _Stretch(file, position)
            elif not stretch.takes(file, position, piece):
                break
            stretch.parts.append((tensor, piece))
            stretch.num_bytes += piece.nbytes
            tensor.waiting.popleft()
            tensor.num_flying += 1
            if not tensor.waiting:
                self._begun = None
        return stretch

    def _begin(self) -> bool:
        """Take up the next tensor, unless it would go beyond the budget while others may still be let go of."""
        if not self._waiting:
            return False
        name = self._waiting[0]
        info = self._checkpoint.tensors[name]
        if self._held + info.num_bytes > self._budget and self._held:
            return False
        self._waiting.popleft()
        given = self._into(name) if self._into else None
        out = self._checkpoint.destination(name, given, self._budget)
        cost = info.num_bytes if given is None else 0
        self._held += cost
        waiting = deque((info.offsets[0] + position, piece) for position, piece in pieces(out))
        self._begun = _Tensor(name, out, cost, waiting)
        return True

    def _take(self) -> None:
        """Put the next pieces that come into their places."""
        try:
            ticket, raw = self._session.next()
        except PieceError as error:
            if error.ticket is None:
                raise CheckpointError(self._checkpoint.source, [str(error)]) from error
            raise self._failure(self._flying[error.ticket], error) from error
        stretch = self._flying.pop(ticket)
        self._in_flight -= stretch.num_bytes
        start = 0
        for tensor, piece in stretch.parts:
            if raw is not None:
                fill(piece, raw[start : start + piece.nbytes])
                start += piece.nbytes
            tensor.num_flying -= 1
            if not (tensor.waiting or tensor.num_flying):
                self._done.append(tensor)

    def _file(self, name: str) -> OpenFile:
        if name not in self._files:
            self._files[name] = self._checkpoint.open_file(name)
        return self._files[name]

    def _finish(self, tensor: _Tensor) -> None:
        """See that the file is still the one that was opened; where asking is dear, with its last tensor."""
        info = self._checkpoint.tensors[tensor.name]
        if info.dtype == "BOOL":
            as_bools(tensor.out)
        self._left[info.file] -= 1
        file = self._files[info.file]
        if file.is_cheap_to_identify or not self._left[info.file]:
            self._checkpoint.check_identity(file)
        if not self._left[info.file]:
            self._files.pop(info.file).close()

    def _failure(self, stretch: _Stretch, error: OSError) -> CheckpointError:
        (first, _), (last, _) = stretch.parts[0], stretch.parts[-1]
        which = f"tensor {first.name!r}" if first is last else f"one of tensors {first.name!r} to {last.name!r}"
        problem = f"{which} of {stretch.file} cannot be read: {error.strerror or error}"
        return CheckpointError(self._checkpoint.source, [problem])
