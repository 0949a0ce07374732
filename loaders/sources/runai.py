"""runai-model-streamer without torch: six functions of its C library, which reads many stretches of files at once.

The Python package imports torch; ``libstreamer.so`` needs nothing. It reads into memory of ours, a piece at a time, so
that none of its own ring is held: no bound below which a large tensor cannot be read, and nothing borrowed from it.
Answers come in any order. Each store has a library of its own (``loaders/sources/library.py``), because of what that
keeps. Source: ``runai_model_streamer/libstreamer`` of 0.17.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType

import numpy as np

from loaders.errors import reason
from loaders.reading import memory
from loaders.reading.memory import STAGING_BYTES, aligned_empty
from loaders.reading.regions import Piece
from loaders.sources.library import Device, install, library_of
from loaders.sources.source import OpenFile, PieceError
from loaders.sources.streamers import streamers_of

DEADLINE_S = (
    28.0  # without a piece, of STAGING_BYTES at most, arriving; a server is given two, which is within a minute
)
CLOSE_S = 1.0  # that closing waits for what is on its way
_SUCCESS, _FINISHED, _TIMED_OUT = 0, 1, 16
MARK_BYTES = 8  # where bytes are to come that did not, these are still there, or the last of them
_MARKS_END = 0xFF  # no float ends in it that a weight or a scale may be, so few are asked for once more
_MARKED_BYTES = 1 << 20  # of a file between two marks: the library asks a server for so many, or a multiple
_NO_PLUGIN = (4, 12, 13)
_SLICE_MS = 200  # of waiting, so that an interrupt is heard
_NO_TICKET = 2**64 - 1


@dataclass(eq=False)
class _Flight:
    """A stretch that is asked for: the library writes to its memory until it has answered."""

    file: OpenFile
    position: int
    buffer: np.ndarray
    num_bytes: int
    marks: list[tuple[int, int]]  # where in the buffer
    # written to by the library as it takes the request, so that an interrupt cannot come between
    ticket: ctypes.c_uint64 = field(default_factory=lambda: ctypes.c_uint64(_NO_TICKET))


def _after_fork() -> None:
    """Streamers, and the threads that libraries wait for at exit, are the parent's."""
    if streamers_of.cache_info().currsize:
        streamers_of.cache_clear()
        _exit_as_we_are()


os.register_at_fork(after_in_child=_after_fork)


class RunaiSession:
    """A streamer of the library; see ``loaders.sources.source.Session``.

    The library cannot be told to stop: a server that hangs keeps it writing to the memory it was given for as long as
    its own client waits. So that memory is the session's own and is given up with it, never the caller's.

    Nor does it look whether as much came as it asked for: an answer that is shorter, and says so, is a success, and
    what was in memory stands for the rest. So marks lie where an answer may end. If the last byte of one is still there
    then, too little came, or the file has that byte: it is asked for once more, by another client.

    Args:
        where: the address; its scheme says which store is asked, the whole is for messages.
        credentials: of an object store, by the library's names: ``access_key_id``, ``endpoint``, ...
    Raises:
        OSError: the library is not installed, or refuses.
    """

    def __init__(self, where: str, credentials: Mapping[str, str] = MappingProxyType({})) -> None:
        self.where, self.credentials = where, credentials
        self._scheme = where.partition("://")[0]
        self._library = library_of(self._scheme)
        self._flights: list[_Flight] = []
        self._answered = ctypes.c_uint64(_NO_TICKET)  # the last ticket that came
        self._mark = np.frombuffer(os.urandom(MARK_BYTES - 1) + bytes([_MARKS_END]), np.uint8)
        self._empty: list[int] = []  # tickets below zero, which the library has none of
        self._free: list[np.ndarray] = []
        self._failed: list[np.ndarray] = []  # which the library may still be writing to
        self._lent: np.ndarray | None = None
        self.stretch_bytes = memory.STAGING_BYTES  # all of it is lent memory
        self.num_stretches = 8  # a window, as for files
        self._streamers, self._kind = streamers_of(self._scheme), tuple(sorted(credentials.items()))
        self._streamer = self._streamers.begin(self._kind, self._start)

    def _start(self) -> ctypes.c_void_p:
        streamer = ctypes.c_void_p()
        self._check(self._library.runai_file_streamer_start(ctypes.byref(streamer)))
        if self._kind:
            texts = ctypes.c_char_p * len(self._kind)
            names, values = (texts(*map(str.encode, each)) for each in zip(*self._kind, strict=True))
            code = self._library.runai_file_streamer_set_credentials(streamer, names, values, len(self._kind))
            if code != _SUCCESS:
                self._library.runai_file_streamer_end(streamer)
            self._check(code)
        return streamer

    def submit(self, file: OpenFile, position: int, pieces: Sequence[Piece]) -> int:
        num_bytes = sum(piece.num_bytes for piece in pieces)
        if not num_bytes:  # the library is not asked for nothing
            self._empty.append(-1 - len(self._empty))
            return self._empty[-1]
        buffer = self._buffer(num_bytes)
        flight = _Flight(file, position, buffer, num_bytes, _marks(num_bytes, position))
        for start, stop in flight.marks:
            buffer[start:stop] = self._mark[start - stop :]
        self._flights.append(flight)
        code = self._library.runai_file_streamer_request(
            *(self._streamer, ctypes.byref(flight.ticket), 1),
            *((ctypes.c_char_p * 1)(file.address.encode()), (ctypes.c_uint32 * 1)(1)),
            *((ctypes.c_size_t * 1)(position), (ctypes.c_size_t * 1)(num_bytes)),
            *((ctypes.c_void_p * 1)(buffer.ctypes.data), Device(0, 0)),
        )
        if code != _SUCCESS:
            self._failed.append(buffer)
            self._flights.remove(flight)
        self._check(code)
        return flight.ticket.value

    def next(self) -> tuple[int, np.ndarray]:
        assert self._flights or self._empty, "nothing was submitted"
        if self._empty:
            return self._empty.pop(), np.empty(0, np.uint8)
        if self._lent is not None and self._lent.size == STAGING_BYTES:
            self._free.append(self._lent)
        self._lent = None
        ticket, code = self._response()
        flight = next((each for each in self._flights if each.ticket.value == ticket), None)
        if flight is None:  # it has stopped altogether
            raise PieceError(self._message(code))
        if code != _SUCCESS:
            self._failed.append(flight.buffer)
        self._flights.remove(flight)
        if code != _SUCCESS:
            raise PieceError(self._message(code), ticket)
        if problem := self._shortfall(flight):
            self._failed.append(flight.buffer)
            raise PieceError(problem, ticket)
        self._lent = flight.buffer
        return ticket, flight.buffer[: flight.num_bytes]

    def _shortfall(self, flight: _Flight) -> str | None:
        """What is wrong with a stretch of which not all came; None: all did."""
        for start, stop in flight.marks:
            if flight.buffer[stop - 1] != _MARKS_END:
                continue
            try:
                expected = flight.file.read(flight.position + start, stop - start)
            except OSError as error:
                return reason(error)
            if flight.buffer[start:stop].tobytes() != expected:
                return f"fewer bytes came than the {flight.num_bytes} asked for ({self.where}): truncated"
        return None

    def close(self) -> None:
        streamer, self._streamer = self._streamer, ctypes.c_void_p()
        if not streamer:
            return
        flights, failed = self._flights, self._failed
        self._flights, self._failed, self._free, self._lent = [], [], [], None
        # one that was interrupted was not asked for, or is answered: nobody knows how, so its memory stays to the end
        known = {_NO_TICKET, self._answered.value}
        left = sum(flight.ticket.value not in known for flight in flights)
        is_well = left == len(flights) and not failed
        kept = [*(flight.buffer for flight in flights), *failed]

        def arrive() -> None:
            if self._bring(streamer, left) and is_well:
                kept.clear()
                self._streamers.rest(streamer, self._kind)
            else:
                self._streamers.end(streamer, kept.clear)

        if not left:
            arrive()
            return
        arriving = threading.Thread(target=arrive, name="tandem-runai-end", daemon=True)
        arriving.start()
        arriving.join(CLOSE_S)
        if arriving.is_alive():
            _exit_as_we_are()

    def _bring(self, streamer: ctypes.c_void_p, count: int) -> bool:
        """Wait for so many stretches, however long. Whether all of them came."""
        codes: list[int] = []
        while len(codes) < count and _FINISHED not in codes:
            codes.append(self._await(streamer, ctypes.c_uint64(), 0))
        return all(code == _SUCCESS for code in codes)

    def _response(self) -> tuple[int, int]:
        until = time.monotonic() + DEADLINE_S
        while True:
            code = self._await(self._streamer, self._answered, _SLICE_MS)
            if code != _TIMED_OUT:
                return self._answered.value, code
            self._answered.value = _NO_TICKET
            if time.monotonic() > until:
                raise PieceError(f"nothing has come from {self.where} for {DEADLINE_S:g} s. Is it still there?")

    def _await(self, streamer: ctypes.c_void_p, ticket: ctypes.c_uint64, most_ms: int) -> int:
        """How what came next went, and which ``ticket`` it is of; 0 milliseconds: however long it takes."""
        done, file, index = ctypes.c_int(), ctypes.c_uint32(), ctypes.c_uint32()
        out = (ctypes.byref(ticket), ctypes.byref(file), ctypes.byref(index), ctypes.byref(done))
        return self._library.runai_file_streamer_response(streamer, *out, most_ms)

    def _buffer(self, num_bytes: int) -> np.ndarray:
        """Memory for a piece; small ones are not worth keeping."""
        if 2 * num_bytes < STAGING_BYTES or num_bytes > STAGING_BYTES:
            return aligned_empty((num_bytes,), np.dtype(np.uint8))
        return self._free.pop() if self._free else aligned_empty((STAGING_BYTES,), np.dtype(np.uint8))

    def _check(self, code: int) -> None:
        if code != _SUCCESS:
            raise PieceError(self._message(code))

    def _message(self, code: int) -> str:
        said = self._library.runai_file_streamer_response_str(code).decode()
        hint = f" {install(self._scheme)}, whose packages have to be of one version" if code in _NO_PLUGIN else ""
        return f"{said} ({self.where}).{hint}"


def _marks(num_bytes: int, position: int) -> list[tuple[int, int]]:
    """The last ``MARK_BYTES`` of what may be asked for at once, among so many of a file from ``position`` on."""
    ends = [*range(_MARKED_BYTES - position % _MARKED_BYTES, num_bytes, _MARKED_BYTES), num_bytes]
    return [(max(start, stop - MARK_BYTES), stop) for start, stop in itertools.pairwise([0, *ends])]


@cache
def _exit_as_we_are() -> None:
    """Let the process end with its status, while a thread of the library still waits for a server.

    Such a thread uses what the library's destructors destroy at exit: the process would crash then, or wait for ever.
    The C library calls what is to be done at exit in reverse order, so ours, which ends it, comes before them.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):  # glibc, which wheels of the streamer are for
        atexit.register(libc.fflush, None)
        libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)
