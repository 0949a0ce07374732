"""Objects of a store as the files of a checkpoint: what all stores have in common."""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

from loaders.sources.local import is_plain
from loaders.sources.runai import DEADLINE_S
from loaders.sources.source import Identity, Result, Session, Unreachable, small_file

CONNECT_S, READ_S = 5, 15  # for each of the attempts at a request
LISTING_S = 30  # for all pages of a listing, with the last one of which a minute is over
ATTEMPTS = 8  # with growing pauses where a server is busy or does not answer; after DEADLINE_S it is given up
REQUESTS = 8  # at once
PART_BYTES = 1 << 16  # of an answer, at a time: what came of one when a connection breaks is lost
BUSY = (429, 500, 502, 503, 504)
GONE, CHANGED = "there is no such object", "it changed since it was opened"

Pinned = TypeVar("Pinned", bound=Identity)


class Broken(Unreachable):
    """A connection broke while an answer came. Clients make no other attempt then: to them it was answered."""


class ObjectFile(ABC, Generic[Pinned]):
    """One object, as it was when it was opened (``opened``): a part of another one is never read."""

    opened: Pinned

    def __init__(self, name: str, address: str, known: Pinned | None) -> None:
        self.name, self.address = name, address
        self.opened = self.identity() if known is None else known

    def close(self) -> None:  # noqa: B027 (nothing is held open)
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def identity(self) -> Pinned:
        return in_time(self.identify, DEADLINE_S, "an answer")

    @abstractmethod
    def identify(self) -> Pinned:
        """What the server says of the object, in whatever time."""

    @abstractmethod
    def parts(self, position: int, count: int) -> Iterable[bytes]:
        """Bytes ``position`` to ``position + count`` as they arrive.

        Raises:
            Broken: the connection broke on the way.
            OSError: it is another object by now.
        """

    def read_into(self, out: memoryview, position: int) -> None:
        if not len(out):
            return
        allowed_s = max(DEADLINE_S, len(out) / 1e6)  # slower than 1 MB/s is as good as gone
        found = bytearray()

        def take() -> None:
            for attempt in range(1, ATTEMPTS + 1):
                before = len(found)
                try:
                    for part in self.parts(position + before, len(out) - before):
                        found.extend(part)
                        if len(found) > len(out):
                            raise OSError(f"more came than the {len(out)} bytes asked for from byte {position} on")
                    return
                except Broken:
                    if attempt == ATTEMPTS:
                        raise

        in_time(take, allowed_s, f"{len(out)} bytes")
        done = len(found)
        if done != len(out):
            raise OSError(f"{done} bytes came from byte {position} on, expected {len(out)}: truncated")
        out[:] = found

    def read(self, position: int, count: int) -> bytes:
        out = bytearray(count)
        self.read_into(memoryview(out), position)
        return bytes(out)


class ObjectPrefix(ABC):
    """The objects right under ``bucket/prefix``, by the rest of their key.

    Raises:
        OSError: the address has no bucket, or an empty part.
    """

    scheme: ClassVar[str]
    _made: tuple[int, Any] | None  # the client, and of which process it is
    gap_bytes = 1 << 20  # a request takes as long as a megabyte does
    is_dear_to_ask = True

    def __init__(self, path: str) -> None:
        self._at_once, self._made = REQUESTS, None
        self.bucket, _, prefix = path.partition("/")
        self.prefix = prefix.strip("/")
        if not self.bucket:
            raise OSError(f"it names no bucket, expected {self.scheme}://bucket/prefix")
        if "//" in path:
            raise OSError(
                "a part of its prefix has no name, and the streamer reads no such objects. Is a '/' too many?"
            )

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}"

    @property
    def absolute(self) -> str:
        return str(self)

    def __fspath__(self) -> str:
        return self.absolute

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def address(self, name: str) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key(name)}"

    @abstractmethod
    def connect(self) -> Any:
        """A client of the store. Raises OSError."""

    @abstractmethod
    def pages(self, start: str) -> Iterator[list[str]]:
        """Keys of all objects whose key starts so, and has no slash in the rest; each page is a request."""

    @abstractmethod
    def open_object(self, name: str, known: Any) -> ObjectFile: ...

    @abstractmethod
    def session(self, total_bytes: int) -> Session: ...

    def is_current(self, session: Session) -> bool:
        return True

    def names(self) -> list[str]:
        start = self.key("")
        pages = self.pages(start)
        keys: list[str] = []
        until = time.monotonic() + LISTING_S
        while (page := in_time(lambda: next(pages, None), DEADLINE_S, "an answer")) is not None:
            keys += page
            if time.monotonic() > until:
                raise Unreachable(
                    f"after {LISTING_S:g} s and {len(keys)} names there is no end to what lies under {self}/. Give the"
                    " prefix that the checkpoint's own files have."
                )
        names = sorted(key[len(start) :] for key in keys if key != start)
        if not names:
            raise OSError(f"there is no object under {self}/")
        return names

    def open(self, name: str, known: Identity | None = None) -> ObjectFile:
        """Open the object called ``name``; see ``Source.open``.

        Raises:
            OSError: there is none, it cannot be asked for, or the name leads out of the checkpoint.
        """
        if not is_plain(name):
            raise OSError("it is not a plain file name inside the checkpoint")
        return self.open_object(name, known)

    def identity(self, name: str) -> Identity:
        return self.open(name).opened

    def read_file(self, name: str) -> bytes:
        with self.open(name) as file:
            return small_file(file, file.opened.num_bytes)

    def in_parallel(self, work: Callable[[str], Result], names: Collection[str]) -> Iterator[Result]:
        """See ``Source.in_parallel``. A server that answers some requests and gives up others is asked one by one.

        From then on all of this source's requests are made so, by another client.
        """
        left = deque(names)
        if len(left) > 1 and self._at_once > 1:
            assert self.client is not None  # it is made here, before several ask for it at once
            results = _AtOnce(work, left, self._at_once)
            try:
                for result in results:
                    left.popleft()
                    yield result
            except Unreachable:
                results.settle(1.0)  # others may have been answered at this very moment
                if not results.has_answers:
                    raise
                results.settle(DEADLINE_S)
                self.client.close()  # its connections may be all that the server has
                self._at_once, self._made = 1, None
        yield from map(work, left)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}  # another process connects anew

    @property
    def client(self) -> Any:
        """What asks the server; a forked child has its own, for two may not share connections."""
        if self._made is None or self._made[0] != os.getpid():
            self._made = os.getpid(), self.connect()
        return self._made[1]


class _AtOnce(Generic[Result]):
    """Results of ``work`` in the order of ``names``, by as many threads at once as there may be.

    multiprocessing's pool would do, but for what it does to a process: it sets the way others are started, and takes
    shared memory. What nobody waits for any more ends by itself.

    Raises:
        Exception: what ``work`` raises, as soon as it does.
    """

    def __init__(self, work: Callable[[str], Result], names: Iterable[str], count: int) -> None:
        self.has_answers = False
        self._work, self._todo = work, deque(enumerate(names))
        self._size, self._done = len(self._todo), SimpleQueue()
        self._count = min(count, self._size)
        self._threads: list[threading.Thread] = []

    def __iter__(self) -> Iterator[Result]:
        found: dict[int, Result] = {}
        try:
            self._start()
            for index in range(self._size):
                while index not in found:
                    place, result, error = self._done.get()
                    if error is not None:
                        raise error
                    found[place] = result
                yield found.pop(index)
        finally:
            self._todo.clear()

    def _start(self) -> None:
        for number in range(self._count):
            thread = threading.Thread(target=self._run, name="tandem-requests", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                if not number:
                    raise OSError(f"nothing can be asked: {error}") from error
                return  # no more threads can be started: those there are will do
            self._threads.append(thread)

    def settle(self, most_s: float) -> None:
        """Wait for what is still on its way."""
        until = time.monotonic() + most_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        while True:
            try:
                index, name = self._todo.popleft()
            except IndexError:
                return
            try:
                self._done.put((index, self._work(name), None))
                self.has_answers = True
            except BaseException as error:  # noqa: BLE001 - it is raised by who waits
                if isinstance(error, Unreachable):
                    self._todo.clear()  # each would take as long again
                self._done.put((index, None, error))


@contextmanager
def making_sense() -> Iterator[None]:
    """Around what reads an answer: raises OSError where a field is missing, of another type or none that can be."""
    try:
        yield
    except KeyError as error:
        raise OSError(f"the server does not say its {error.args[0]}") from error
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise OSError(f"the server's answer makes no sense ({said})") from error


def text(value: object) -> str:
    """What a server calls something. Raises TypeError: it is no text."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} where text is expected")
    return value


def natural(number: object) -> int:
    """What a server says of a size. Raises ValueError: it is none."""
    if isinstance(number, bool) or not isinstance(number, int | str) or int(number) < 0:
        raise ValueError(f"{number!r} where an integer from 0 on is expected")
    return int(number)


def check_range(said: object, position: int) -> None:
    """Raises OSError where an answer is not of bytes from ``position`` on, by its Content-Range.

    Without one it is of the whole object, which from its beginning on is as good: what is too much is seen.
    """
    if not (said is None and position == 0) and not str(said).startswith(f"bytes {position}-"):
        raise OSError(
            f"the server has no ranges: asked from byte {position} on, it answers with Content-Range {said!r}"
        )


def in_time(work: Callable[[], Result], allowed_s: float, what: str) -> Result:
    """What ``work`` returns, or raises. Raises Unreachable where it does not end in time; ``what`` says what is late.

    A client waits for as long as a byte comes now and then, saying nothing meanwhile: a thread can be left to it.
    """
    found: list[Result] = []
    failed: list[Exception] = []

    def attempt() -> None:
        try:
            found.append(work())
        except Exception as error:  # noqa: BLE001 - it is raised by who waits
            failed.append(error)

    working = threading.Thread(target=attempt, name="tandem-object", daemon=True)
    working.start()
    working.join(allowed_s)
    if working.is_alive():
        raise Unreachable(f"{what} did not come in {allowed_s:.0f} s. Is the server in trouble?")
    if failed:
        raise failed[0]
    return found[0]
