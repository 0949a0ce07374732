"""What the processes of a mesh tell each other, where JAX's processes meet: its coordination service.

No device takes part in it. So it works whatever meshes, guards and compilers they have, and those that do not come are
known by their number. JAX itself ends all processes when one has died, after ``heartbeat_timeout_seconds``; those that
wait for it here are told before, so that they can take away what they had begun.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax

WAIT_S = 600.0  # for processes that do not come
BEAT_S = 1.0  # between two signs of life; the longest that anybody waits before looking at those of others
STILL_S = 20.0  # without one of them
MESSAGE_LETTERS = 4096
_GAVE_UP = "!"  # before what is said by one that takes no part
_LIFE = "tandem/life/"
_TIMES: dict[tuple[int, ...], int] = {}  # how often these processes have come together


def told_by(processes: Sequence[int], text: str) -> dict[int, str]:
    """Every process's text, its first ``MESSAGE_LETTERS``, by its index. All of them have to call this.

    Args:
        processes: indices as JAX counts them, this one's among them, in the order that all give.
        text: this process's; what UTF-8 lacks is escaped.

    Raises:
        RuntimeError: one did not come within ``WAIT_S``, is gone, or gave up itself, as where it was interrupted.
    """
    here, text = _next(processes), text.encode(errors="backslashreplace").decode()[:MESSAGE_LETTERS]
    try:
        _say(here, text)
        told = _read(here, text)
    except BaseException as error:
        # those that are yet to come must not take it that this one goes on
        _say(here, f"{_GAVE_UP}gave up: {type(error).__name__}", again=True)
        raise
    if gone := {process: said for process, said in told.items() if said.startswith(_GAVE_UP)}:
        raise RuntimeError("; ".join(f"process {process} {said[len(_GAVE_UP) :]}" for process, said in gone.items()))
    return told


def leave(processes: Sequence[int], error: BaseException) -> None:
    """Take no part in what the others come together for next, and do not wait for them: they are told of it."""
    _say(_next(processes), f"{_GAVE_UP}gave up: {type(error).__name__}", again=True)


def times_together(processes: Sequence[int]) -> int:
    """How often they have come together, which all count alike."""
    return _TIMES.get(tuple(processes), 0)


def _next(processes: Sequence[int]) -> tuple[int, ...]:
    """The processes, which come together once more."""
    here = tuple(processes)
    _Life.begin()
    _TIMES[here] = _TIMES.get(here, 0) + 1
    return here


def _say(here: tuple[int, ...], text: str, *, again: bool = False) -> None:
    if not again:  # all have come to the time before, so nobody reads any more what was said before that
        _Life.begin().unread.append(f"{_place(here, _TIMES[here] - 2)}{jax.process_index()}")
    _service().key_value_set(f"{_place(here, _TIMES[here])}{jax.process_index()}", text, allow_overwrite=again)


def _read(here: tuple[int, ...], text: str) -> dict[int, str]:
    """What all have said, this time; this one ``text``."""
    service, place, found = _service(), _place(here, _TIMES[here]), {jax.process_index(): text}
    until, signs = time.monotonic() + WAIT_S, _Signs()
    while missing := [process for process in here if process not in found]:
        if time.monotonic() > until:
            raise RuntimeError(
                f"processes {missing} of {list(here)} did not come within {WAIT_S:g} s. Did it fail earlier,"
                " or is it making another call? See its log."
            )
        try:
            told = service.blocking_key_value_get(f"{place}{missing[0]}", int(1000 * min(BEAT_S, WAIT_S)))
            found = found | {missing[0]: told} if len(missing) == 1 else _told_at(place)
        except jax.errors.JaxRuntimeError as error:  # it is still not there
            if gone := signs.ceased(missing):
                why = f"processes {gone} of {list(here)} are gone: no sign of life for {STILL_S:g} s"
                raise RuntimeError(why) from error
    return {process: found[process] for process in here}


class _Signs:
    """The signs of life of other processes, as they are seen from here."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[str, float]] = {}  # what it was, and since when
        self._clock, self._looked = 0.0, time.monotonic()  # the first stands still where this process does

    def ceased(self, processes: Sequence[int]) -> list[int]:
        """Of these processes those that gave some, and none for ``STILL_S``."""
        looked, seen = time.monotonic(), _told_at(_LIFE)
        self._clock += min(looked - self._looked, 2 * BEAT_S)
        self._looked, now = looked, self._clock
        for process in processes:
            if process in seen and self._last.get(process, ("", now))[0] != seen[process]:
                self._last[process] = seen[process], now
        return [one for one in processes if one in self._last and now - self._last[one][1] > STILL_S]


class _Life(threading.Thread):
    """Gives a sign of this process's life from time to time, once it has begun to talk to others.

    ``unread``: what nobody reads any more of what it said, which it takes away then.
    """

    _lives: _Life | None = None

    def __init__(self) -> None:
        super().__init__(name="tandem signs of life", daemon=True)
        self._ends, self._service, self._me = threading.Event(), _service(), jax.process_index()
        self.unread: list[str] = []

    @classmethod
    def begin(cls) -> _Life:
        """Once, and again after JAX's processes have met anew."""
        if cls._lives is not None and cls._lives._service is not _service():
            cls._lives.end()
            _TIMES.clear()  # they meet elsewhere, and one of them may have been started anew
        if cls._lives is None or not cls._lives.is_alive():
            cls._lives = cls()
            cls._lives.start()
            atexit.register(cls._lives.end)
        return cls._lives

    def end(self) -> None:
        """Before Python is taken down, which a thread in the middle of a call does not survive."""
        self._ends.set()
        self.join(10)

    def run(self) -> None:
        with contextlib.suppress(ValueError, jax.errors.JaxRuntimeError):  # jax.distributed was shut down
            for beat in itertools.count():
                if _service() is not self._service:  # another one, which need not be connected yet
                    return
                self._service.key_value_set(f"{_LIFE}{self._me}", str(beat), allow_overwrite=True)
                while self.unread:
                    self._service.key_value_delete(self.unread.pop())
                if self._ends.wait(BEAT_S):
                    return


def _told_at(place: str) -> dict[int, str]:
    return {int(key.rpartition("/")[2]): said for key, said in _service().key_value_dir_get(place)}


def _place(here: tuple[int, ...], times: int) -> str:
    return f"tandem/{'-'.join(map(str, here))}/{times}/"


def _service() -> Any:
    from orbax.checkpoint import multihost  # half a second, for several processes alone

    return multihost.get_jax_distributed_client()
