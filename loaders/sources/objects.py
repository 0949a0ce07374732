"""Objects of a store as the files of a checkpoint: what all stores have in common."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from multiprocessing.pool import ThreadPool
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

from loaders.sources.local import is_plain
from loaders.sources.runai import DEADLINE_S
from loaders.sources.source import Identity, Result, Session, Unreachable, small_file

CONNECT_S, READ_S = 5, 15  # for each of the attempts at a request
ATTEMPTS = 8  # with growing pauses where a server is busy or does not answer; after DEADLINE_S it is given up
REQUESTS = 16  # at once
BUSY = (429, 500, 502, 503, 504)
GONE, CHANGED = "there is no such object", "it changed since it was opened"

Pinned = TypeVar("Pinned", bound=Identity)


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
        """Bytes ``position`` to ``position + count`` as they arrive. Raises OSError: it is another object by now."""

    def read_into(self, out: memoryview, position: int) -> None:
        if not len(out):
            return
        allowed_s = max(DEADLINE_S, len(out) / 1e6)  # slower than 1 MB/s is as good as gone
        found = bytearray()

        def take() -> None:
            for part in self.parts(position, len(out)):
                found.extend(part)
                if len(found) > len(out):
                    raise OSError(f"more came than the {len(out)} bytes asked for from byte {position} on")

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
    gap_bytes = 1 << 20  # a request takes as long as a megabyte does
    is_dear_to_ask = True

    def __init__(self, path: str) -> None:
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
    def pages(self, start: str) -> Iterator[list[str]]:
        """Keys of all objects whose key starts so, and has no slash in the rest; each page is a request."""

    @abstractmethod
    def open_object(self, name: str, known: Any) -> ObjectFile: ...

    @abstractmethod
    def session(self, total_bytes: int) -> Session: ...

    def names(self) -> list[str]:
        start = self.key("")
        pages = self.pages(start)
        keys: list[str] = []
        while (page := in_time(lambda: next(pages, None), DEADLINE_S, "an answer")) is not None:
            keys += page
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
        if len(names) < 2:
            yield from map(work, names)
            return
        with ThreadPool(min(len(names), REQUESTS)) as pool:  # its end waits for none of them
            yield from pool.imap(work, names)


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
