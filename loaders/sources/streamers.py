"""Streamers of runai-model-streamer's C library: used again while others read, and ended together when none does."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Hashable
from functools import cache

from loaders.sources.library import library_of

End = Callable[[], None]


class Streamers:
    """Those of one store.

    The end of one cancels what all others of its store are reading, and while it waits for a server none can begin. So
    each waits until nobody reads; and as it has threads and connections of its own, whoever comes next is given it.
    """

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme
        self._lock = threading.Lock()
        self._num_reading = 0
        self._idle: dict[Hashable, list[ctypes.c_void_p]] = {}
        self._ending: list[tuple[ctypes.c_void_p, End]] = []

    def begin(self, kind: Hashable, start: Callable[[], ctypes.c_void_p]) -> ctypes.c_void_p:
        """One that is idle, or else a new one.

        Args:
            kind: what it must have been started with to be as good as another.
            start: starts it.
        """
        with self._lock:
            idle = self._idle.get(kind)
            streamer = idle.pop() if idle else start()
            self._num_reading += 1
            return streamer

    def rest(self, streamer: ctypes.c_void_p, kind: Hashable) -> None:
        """It has brought all that it was asked for."""
        with self._lock:
            self._idle.setdefault(kind, []).append(streamer)
            self._stop_reading()

    def end(self, streamer: ctypes.c_void_p, then: End) -> None:
        """It failed: nobody is given it any more. ``then`` is called when it has ended."""
        with self._lock:
            self._ending.append((streamer, then))
            self._stop_reading()

    def _stop_reading(self) -> None:
        self._num_reading -= 1
        if self._num_reading:
            return
        library = library_of(self._scheme)
        for streamer in (one for idle in self._idle.values() for one in idle):
            library.runai_file_streamer_end(streamer)
        for streamer, then in self._ending:
            library.runai_file_streamer_end(streamer)
            then()
        self._idle.clear()
        self._ending.clear()


@cache
def streamers_of(scheme: str) -> Streamers:
    return Streamers(scheme)
