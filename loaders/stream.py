"""Tensors of a source that reads many files at once: each as soon as its last piece has come, in whatever order.

Nothing that the source lends is kept: every piece is copied to its place before the next is asked for, so a tensor is
memory of the caller's or of its own, like any other that ``Checkpoint.stream`` yields.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loaders.errors import CheckpointError
from loaders.memory import as_bools, fill, pieces
from loaders.sources import OpenFile, PieceError, Session

if TYPE_CHECKING:
    from loaders.checkpoint import Checkpoint

WINDOW_BYTES = 64 << 20  # on its way at any moment
MOST_PIECES = 64  # likewise


@dataclass
class _Tensor:
    """One that was begun: not all of its pieces have come."""

    name: str
    out: np.ndarray
    cost: int  # bytes of our own
    waiting: Iterator[tuple[int, np.ndarray]]
    num_flying: int = 0
    is_submitted: bool = False


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
        self._flying: dict[int, tuple[_Tensor, np.ndarray]] = {}
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
        """Ask for as many pieces as there is room for; a tensor's all before the next one's."""
        while len(self._flying) < MOST_PIECES:
            if self._begun is None and not self._begin():
                return
            tensor = self._begun
            assert tensor is not None
            if self._flying and self._in_flight >= self._window:
                return
            found = next(tensor.waiting, None)
            if found is None:
                self._begun, tensor.is_submitted = None, True
                if not tensor.num_flying:
                    self._done.append(tensor)
                continue
            position, piece = found
            info = self._checkpoint.tensors[tensor.name]
            file = self._file(info.file)
            try:
                ticket = self._session.submit(file, info.offsets[0] + position, piece.nbytes)
            except OSError as error:
                raise self._failure(tensor.name, error) from error
            self._flying[ticket] = tensor, piece
            tensor.num_flying += 1
            self._in_flight += piece.nbytes

    def _begin(self) -> bool:
        """Take up the next tensor, unless it would go beyond the budget while others may still be let go of."""
        if not self._waiting:
            return False
        name = self._waiting[0]
        size = self._checkpoint.tensors[name].num_bytes
        if self._held + size > self._budget and self._held:
            return False
        self._waiting.popleft()
        given = self._into(name) if self._into else None
        out = self._checkpoint.destination(name, given, self._budget)
        cost = size if given is None else 0
        self._held += cost
        self._begun = _Tensor(name, out, cost, pieces(out))
        return True

    def _take(self) -> None:
        """Put the next piece that comes into its place."""
        try:
            ticket, raw = self._session.next()
        except PieceError as error:
            if error.ticket is None:
                raise CheckpointError(self._checkpoint.source, [str(error)]) from error
            raise self._failure(self._flying[error.ticket][0].name, error) from error
        tensor, piece = self._flying.pop(ticket)
        fill(piece, raw)
        self._in_flight -= piece.nbytes
        tensor.num_flying -= 1
        if tensor.is_submitted and not tensor.num_flying:
            self._done.append(tensor)

    def _file(self, name: str) -> OpenFile:
        if name not in self._files:
            self._files[name] = self._checkpoint.open_file(name)
        return self._files[name]

    def _finish(self, tensor: _Tensor) -> None:
        """With the last tensor of a file, see that it is still the one that was opened."""
        info = self._checkpoint.tensors[tensor.name]
        if info.dtype == "BOOL":
            as_bools(tensor.out)
        self._left[info.file] -= 1
        if self._left[info.file] == 0 and info.file in self._files:
            with self._files.pop(info.file) as file:
                self._checkpoint.check_identity(file)

    def _failure(self, name: str, error: OSError) -> CheckpointError:
        where = f"tensor {name!r} of {self._checkpoint.tensors[name].file}"
        return CheckpointError(self._checkpoint.source, [f"{where} cannot be read: {error.strerror or error}"])
