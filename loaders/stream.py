"""Regions of a checkpoint's tensors, read by a session of its source: each as soon as its last piece is in place.

What lies side by side in a file is read at once, across the bounds of tensors. Nothing that a source lends is kept:
every piece is copied to its place before the next is asked for, so what is yielded is the caller's memory or its own.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from loaders.errors import CheckpointError, reason
from loaders.files.header import TensorInfo
from loaders.files.parallel import PinnedFiles
from loaders.reading import memory
from loaders.reading.memory import as_bools
from loaders.reading.regions import Piece, Region, pieces_of
from loaders.reading.slices import Slice
from loaders.sources import OpenFile, PieceError

WINDOW_BYTES = 64 << 20  # on its way at any moment, or as many stretches as keep the session busy
MOST_STRETCHES = 64  # likewise
MOST_PIECES = 512  # in one stretch; a system takes 1024 buffers at once
_OBJECTS_BYTES = 2048  # that Python keeps of a tensor until the caller is done with it (measured: 1.3 to 1.6 kB)
_NOTHING = Piece(0, 0)  # of a tensor without values, so that it is yielded in its turn

Result = TypeVar("Result")


class Begun(NamedTuple, Generic[Result]):
    """What a part of a tensor turns into as its reading begins.

    Attributes:
        result: what is yielded when it is read.
        regions: what is read; none: no file is touched.
        cost: bytes of our own that this takes until the caller is done with the result.
    """

    result: Result
    regions: list[Region]
    cost: int


@dataclass
class _Tensor(Generic[Result]):
    """One that was begun: not all of its pieces are in place."""

    name: str
    begun: Begun[Result]
    waiting: Iterator[Piece]  # that were not asked for yet
    num_flying: int = 0

    def __post_init__(self) -> None:
        self.first = next(self.waiting, _NOTHING)
        self.is_asked_for = False

    def advance(self) -> bool:
        """On to the next piece; False: there is none."""
        following = next(self.waiting, None)
        self.is_asked_for, self.first = following is None, following or self.first
        return not self.is_asked_for


@dataclass
class _Stretch:
    """Pieces of one tensor or several that follow each other in a file, and what lies between them."""

    file: str
    position: int
    most_gap_bytes: int
    most_bytes: int
    parts: list[tuple[_Tensor | None, Piece]] = field(default_factory=list)
    num_bytes: int = 0
    staged_bytes: int = 0

    def gap(self, file: str, position: int, piece: Piece) -> int | None:
        """Bytes to be read for nothing if ``piece`` is read too; None: that is another stretch's."""
        gap = position - self.position - self.num_bytes
        if file != self.file or not 0 <= gap <= self.most_gap_bytes or len(self.parts) >= MOST_PIECES:
            return None
        staged_bytes = self.staged_bytes + gap + _staged_bytes(piece)
        num_bytes = self.num_bytes + gap + piece.num_bytes
        return gap if num_bytes <= self.most_bytes and staged_bytes <= memory.STAGING_BYTES else None

    def add(self, tensor: _Tensor | None, piece: Piece) -> None:
        self.parts.append((tensor, piece))
        self.num_bytes += piece.num_bytes
        self.staged_bytes += _staged_bytes(piece)

    @property
    def names(self) -> list[str]:
        return [tensor.name for tensor, _ in self.parts if tensor is not None]


def _staged_bytes(piece: Piece) -> int:
    return piece.num_bytes if piece.place is None else 0


class Arrivals(Generic[Result]):
    """One stream, with a session of its own; where another lot begins and that is no longer current, with another.

    Args:
        files: what is read.
        tensors: name -> where in them it lies.
        lots: what is wanted, each in file order; nothing of one is begun before all of the last was yielded.
        begin: called of a part when it is about to be read.
        num_bytes: the most that beginning a part takes.
        budget: bytes of our own that may be held, unless one part alone takes more.
    """

    def __init__(
        self,
        files: PinnedFiles,
        tensors: Mapping[str, TensorInfo],
        lots: Sequence[Sequence[Slice]],
        begin: Callable[[Slice], Begun[Result]],
        num_bytes: Callable[[Slice], int],
        budget: int,
    ) -> None:
        self._files, self._tensors, self._budget = files, tensors, budget
        self._begin_reading, self._num_bytes = begin, num_bytes
        self._session = files.session()
        self._gap_bytes, self._stretch_bytes = files.source.gap_bytes, self._session.stretch_bytes
        self._is_dear_to_ask = files.source.is_dear_to_ask
        self._window = min(max(WINDOW_BYTES, self._session.num_stretches * self._stretch_bytes), budget)
        self._process = os.getpid()
        self._lots = deque(map(deque, lots))
        self._waiting: deque[Slice] = deque()
        self._begun: _Tensor[Result] | None = None  # whose pieces are being asked for
        self._flying: dict[int, _Stretch] = {}
        self._done: deque[_Tensor[Result]] = deque()
        self._held = self._in_flight = 0
        self._opened: dict[str, OpenFile] = {}
        self._checked: set[str] = set()  # files that were as they had been after the last piece came
        self._left = Counter(tensors[one.name].file for lot in lots for one in lot)
        self._num_left = self._left.total()

    def __iter__(self) -> Iterator[Result]:
        try:
            while self._is_busy() or self._lots:
                self._check_process()
                if not self._is_busy():
                    self._begin_lot()
                self._submit()
                if not self._done:
                    if self._flying:
                        self._take()
                    continue
                tensor = self._done.popleft()
                self._finish(tensor)
                result, cost = tensor.begun.result, tensor.begun.cost + _OBJECTS_BYTES
                del tensor
                yield result
                del result
                self._held -= cost
        finally:
            try:
                if os.getpid() == self._process:
                    self._session.close()
            finally:
                for file in self._opened.values():
                    file.close()

    def _check_process(self) -> None:
        """A child that was forked meanwhile has none of the threads that read: it would wait for ever."""
        if os.getpid() != self._process:
            problem = "this stream was begun in the process that forked this one. Begin another one here"
            raise CheckpointError(self._files.source, [problem])

    def _begin_lot(self) -> None:
        try:
            is_current = self._files.source.is_current(self._session)
        except OSError as error:
            problem = f"it cannot be read further: {reason(error)}"
            raise CheckpointError(self._files.source, [problem]) from error
        if not is_current:
            self._session.close()
            self._session = self._files.session()
        self._waiting = self._lots.popleft()

    def _is_busy(self) -> bool:
        return bool(self._waiting or self._begun or self._flying or self._done)

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
            if tensor is None:
                continue
            info, piece = self._tensors[tensor.name], tensor.first
            position = info.offsets[0] + piece.position
            if stretch is None:
                stretch = _Stretch(info.file, position, self._gap_bytes, self._stretch_bytes)
            if (gap := stretch.gap(info.file, position, piece)) is None and stretch.parts:
                break
            if gap:
                stretch.add(None, Piece(position - gap, gap))
            stretch.add(tensor, piece)
            tensor.num_flying += 1
            if not tensor.advance():
                self._begun = None
        return stretch

    def _begin(self) -> bool:
        """Take up the next tensor, unless it would go beyond the budget while others may still be let go of."""
        if not self._waiting:
            return False
        needed = self._num_bytes(self._waiting[0]) + _OBJECTS_BYTES
        if self._held and self._held + needed > self._budget:
            return False
        part = self._waiting.popleft()
        begun = self._begin_reading(part)
        self._held += begun.cost + _OBJECTS_BYTES
        tensor = _Tensor(part.name, begun, pieces_of(begun.regions, self._gap_bytes))
        if begun.regions:
            self._begun = tensor
        else:
            self._done.append(tensor)
        return True

    def _take(self) -> None:
        """Put the next pieces that come into their places."""
        try:
            ticket, raw = self._session.next()
        except PieceError as error:
            if error.ticket is None:
                raise CheckpointError(self._files.source, [str(error)]) from error
            raise self._failure(self._flying[error.ticket], error) from error
        self._checked.clear()
        stretch = self._flying.pop(ticket)
        self._in_flight -= stretch.num_bytes
        start = 0
        for tensor, piece in stretch.parts:
            if raw is not None:
                piece.take(raw[start : start + piece.num_bytes])
                start += piece.num_bytes
            if tensor is None:
                continue
            tensor.num_flying -= 1
            if tensor.is_asked_for and not tensor.num_flying:
                self._done.append(tensor)

    def _file(self, name: str) -> OpenFile:
        if not self._opened and self._is_dear_to_ask:
            self._files.check(self._left)
        if name not in self._opened:
            self._opened[name] = self._files.open(name)
        return self._opened[name]

    def _finish(self, tensor: _Tensor[Result]) -> None:
        """See that the file is still the one that was opened; where asking is dear, that all are, with the last."""
        info = self._tensors[tensor.name]
        if info.dtype == "BOOL":
            for part in tensor.begun.regions:
                as_bools(part.out)
        self._left[info.file] -= 1
        self._num_left -= 1
        if self._is_dear_to_ask:
            if not self._num_left:
                self._files.check(self._opened)
            return
        if (file := self._opened.get(info.file)) is None:
            return  # nothing of it was read
        is_last = not self._left[info.file]
        if is_last or info.file not in self._checked:
            self._files.check_open(file)
            self._checked.add(info.file)
        if is_last:
            self._opened.pop(info.file).close()

    def _failure(self, stretch: _Stretch, error: OSError) -> CheckpointError:
        first, last = stretch.names[0], stretch.names[-1]
        which = f"tensor {first!r}" if first == last else f"one of tensors {first!r} to {last!r}"
        said = reason(error).rstrip(".")
        if self._is_dear_to_ask:
            try:  # what streams says only that it failed; the server may say why
                self._files.check([stretch.file])
                with self._files.open(stretch.file) as file:
                    file.read(stretch.position, min(stretch.num_bytes, 1))
            except CheckpointError as found:
                said = f"{said}; {'; '.join(found.problems)}"
            except OSError as found:
                said = f"{said}; asked for a byte of it the server says: {reason(found)}"
        problem = f"{which} of {stretch.file} cannot be read: {said}"
        return CheckpointError(self._files.source, [problem])
