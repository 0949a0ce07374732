"""The ranks of torch.distributed: one that waits for another learns why it does not come, and does not hang."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

WAIT_S = 600.0  # for ranks that do not come; torch.distributed itself waits for half an hour
LOOK_S = 1.0  # between two looks at whether one of those that are waited for has failed
GRACE_S = 60.0  # for all ranks to fail alike, as with the same bad input; those that wait for it end it sooner
MESSAGE_LETTERS = 4096
Method = TypeVar("Method", bound=Callable[..., Any])
_COORDINATORS: WeakKeyDictionary[dist.ProcessGroup, Coordinator] = WeakKeyDictionary()


def coordinator() -> Coordinator:
    """Of all processes, for as long as torch.distributed is set up."""
    world = dist.group.WORLD
    assert world is not None, "a mesh is made of its ranks"
    if world not in _COORDINATORS:
        _COORDINATORS[world] = Coordinator()
    return _COORDINATORS[world]


def in_step(method: Method) -> Method:
    """A method that all ranks of a model's mesh call, which learn of one that fails alone. Its class has ``_model``."""

    @wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._model.mesh is None:
            return method(self, *args, **kwargs)
        with coordinator().call():
            return method(self, *args, **kwargs)

    return called  # pyright: ignore[reportReturnType]


class Coordinator:
    """What ranks know of each other while they make the same calls in the same order.

    Before each call they come together, and a failure is of the time since: what a rank raises in the middle of a call
    is written where torch's processes meet (their store), where those look that wait. Ranks that are out of step once
    are so for good, whichever of their models it was: on the wire there are tensors that nobody takes.
    """

    def __init__(self) -> None:
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        store = dist.PrefixStore("tandem", dist.distributed_c10d._get_default_store())
        # processes that set torch.distributed up again may meet in the same store; each does so as often as the others
        self._store = dist.PrefixStore(str(store.add(f"coordinators of {self._rank}", 1)), store)
        self._met = self._failed = self._depth = 0
        self._known: BaseException | None = None  # what all raise, and know of each other
        self._lost: str | None = None  # why nothing can run any more

    def told(self, text: str, device_type: str) -> dict[int, str]:
        """Every rank's text, its first ``MESSAGE_LETTERS``, by its number. All have to call this, inside of a ``call``.

        Args:
            text: this rank's.
            device_type: of tensors that can be sent if those of the CPU cannot.
        Raises:
            RuntimeError: as ``finish``.
        """
        where, text = "cpu" if backend_of("cpu") else device_type, _printable(text)
        digest = hashlib.sha256(text.encode()).digest()
        if {*self._gathered(digest, where)} == {digest}:  # nearly always, and few bytes are enough to know
            told = dict.fromkeys(range(self._size), text[:MESSAGE_LETTERS])
        else:
            data = text[:MESSAGE_LETTERS].encode().ljust(4 * MESSAGE_LETTERS, b"\0")
            told = dict(enumerate(one.rstrip(b"\0").decode() for one in self._gathered(data, where)))
        self._met, self._failed = self._met + 1, 0
        return told

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around what all ranks run.

        Raises:
            RuntimeError: a rank failed here and others did not, now or before: some may still wait for it, or have
                gone on. Nothing runs any more.
        """
        if self._depth == 0:
            self._check()
        self._depth += 1
        try:
            yield
        except BaseException as error:
            is_news = self._size > 1 and self._lost is None and not self._is_known(error)
            if is_news and self._depth == 1:
                self._tell_failure(error)
            raise
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._known = None

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Around what raises on all ranks or on none, once they have told each other: then nobody fails alone."""
        met = self._met
        try:
            yield
        except Exception as error:
            self._known = error if self._met > met else None
            raise

    def finish(self, work: dist.Work | None, device_type: str) -> None:
        """Wait for a collective that was begun, of tensors of such devices.

        Raises:
            RuntimeError: a rank failed, with what was raised there; or is gone; or nothing came for ``WAIT_S``.
        """
        if work is None:  # this rank has no part in it
            return
        if backend_of(device_type) != "gloo":  # nccl has a watchdog of its own
            work.wait()
            return
        until, why = time.monotonic() + WAIT_S, None
        while True:
            is_done = work.is_completed()  # and may yet be done while this one looks, which is no failure
            try:
                work.wait(timedelta(seconds=LOOK_S))
                return
            except RuntimeError as error:
                # what a rank sent before it failed still comes: so there is another look
                is_last = why is not None or is_done
                why = why or self._why(is_late=time.monotonic() > until)
                if is_last:
                    self._lose(why or f"a rank is gone: {error}")
                    raise RuntimeError(self._lost) from error

    def _check(self) -> None:
        """Raises RuntimeError once nothing runs any more; who asked the others would wait for ever."""
        if self._lost is None and self._has("lost"):
            self._lost = self._store.get("lost").decode()
        if self._lost is not None:
            raise RuntimeError(f"{self._lost}. The ranks are out of step: start them again.")

    def _lose(self, why: str) -> None:
        """From now on nothing runs on any rank."""
        self._lost = why
        with suppress(RuntimeError):  # the rank that the others meet at is gone
            self._store.set("lost", why)

    def _why(self, *, is_late: bool) -> str | None:
        """Why what was waited for does not come; None: it still may."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        try:
            if failed := [rank for rank in others if self._has(self._here(rank))]:
                told = self._store.get(self._here(failed[0])).decode()
                return f"rank {failed[0]} failed in the middle of a call: {told}"
            if self._has("lost"):
                return self._store.get("lost").decode()
            self._store.set(f"waits {self._here(self._rank)}", "")
            if not is_late:
                return None
            absent = [rank for rank in others if not self._has(f"waits {self._here(rank)}")]
        except RuntimeError as gone:
            return f"the rank that the others meet at is gone: {gone}"
        who = f"ranks {absent} did not come" if absent else "nothing came from the other ranks"
        return f"{who} within {WAIT_S:g} s. Did it fail earlier, or is it making another call? See its log."

    def _is_known(self, error: BaseException | None) -> bool:
        """Whether it is, or came of, what all ranks raise and have told each other; they may say more of it each."""
        while error is not None and error is not self._known:
            error = error.__cause__ or error.__context__
        return error is not None

    def _tell_failure(self, error: BaseException) -> None:
        """Say that this rank failed, and find out whether all did."""
        text = _printable(f"{type(error).__name__}: {error}")[:MESSAGE_LETTERS]
        self._store.set(self._here(self._rank), text)
        keys, until = [self._here(rank) for rank in range(self._size)], time.monotonic() + GRACE_S
        is_alone = True
        try:
            # where others waited for it they have said so
            while isinstance(error, Exception) and time.monotonic() < until and not self._has("lost"):
                if self._store.check(keys):
                    self._failed, is_alone = self._failed + 1, False
                    return
                time.sleep(0.02)
        finally:  # also where this is interrupted
            if is_alone:
                self._lose(f"rank {self._rank} failed alone in the middle of a call: {text}")

    def _here(self, rank: int) -> str:
        """Where a rank writes that it failed, while it is where this one is."""
        return f"{self._met}.{self._failed}/{rank}"

    def _has(self, key: str) -> bool:
        return self._store.check([key])

    def _gathered(self, data: bytes, device_type: str) -> list[bytes]:
        """Every rank's, which are of one length."""
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device_type)
        theirs = [torch.empty_like(mine) for _ in range(self._size)]
        self.finish(dist.all_gather(theirs, mine, async_op=True), device_type)
        return [one.cpu().numpy().tobytes() for one in theirs]


def _printable(text: str) -> str:
    """The names of files need not be UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def backend_of(device_type: str) -> str:
    """What carries tensors of such devices between ranks; "": nothing does."""
    return dict(pair.split(":") for pair in dist.get_backend_config().split(",")).get(device_type, "")
