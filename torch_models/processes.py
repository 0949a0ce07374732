"""Ranks of a mesh (torch.distributed): each holds its part of every parameter and runs the same calls.

What one of them cannot do none of them does: an error of one is raised by all. A rank that failed on its own, in the
middle of a call or elsewhere, leaves others waiting for it: those are told why, or give up within ``WAIT_S``.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from loaders import agreement
from loaders.agreement import Result

WAIT_S = 600.0  # for ranks that do not come; torch.distributed itself waits for half an hour
LOOK_S = 1.0  # between two looks at whether one of those that are waited for has failed
GRACE_S = 5.0  # for all ranks to fail alike, as with the same bad input
MESSAGE_LETTERS = 4096


def together(mesh: DeviceMesh | None, work: Callable[[], Result]) -> Result:
    """What ``work`` returns, if it succeeds on every rank.

    Args:
        mesh: of all processes, all of which have to call this; None: this one alone.
        work: asks the others for nothing, or for the same as they ask, whether it fails or not.
    Raises:
        Exception: as ``work`` does here.
        RuntimeError: it failed on another rank only, with what was raised there; or one did not come within ``WAIT_S``.
    """
    return agreed(mesh, "", work, lambda _: "")


def agreed(
    mesh: DeviceMesh | None, what: str, work: Callable[[], Result], say: Callable[[Result], str] = str
) -> Result:
    """What ``work`` returns, if all ranks of a mesh make the same of it. Without a mesh nothing is asked.

    Args:
        mesh: of all processes, all of which have to call this.
        what: has to be the same.
        work: as for ``together``.
        say: what it has come to on this rank, in few words.
    Raises:
        ValueError: the ranks say different things; so do all of them. Or as ``together``.
    """
    if mesh is None:
        return work()
    return agreement.agreed(partial(told_by_all, mesh), what, work, say, words=("rank", "ranks"))


def check_alike(mesh: DeviceMesh | None, what: str, say: Callable[[], str]) -> str:
    """What all ranks of a mesh say alike; without a mesh nothing: nobody is asked, nor ``say`` called.

    Raises:
        ValueError: as ``agreed``.
    """
    return "" if mesh is None else agreed(mesh, what, say)


def told_by_all(mesh: DeviceMesh, text: str) -> dict[int, str]:
    """Every rank's text, its first ``MESSAGE_LETTERS``, by its number.

    Raises:
        RuntimeError: a rank did not come within ``WAIT_S``; says which.
    """
    if backend_of("cpu") == "gloo":  # nccl has a watchdog of its own
        try:
            world: Any = dist.group.WORLD
            # not torch.distributed's own function, which wants gloo to be the only one
            world.monitored_barrier(timedelta(seconds=WAIT_S), wait_all_ranks=True)
        except RuntimeError as error:
            raise RuntimeError(f"not all ranks came within {WAIT_S:g} s. Did one fail elsewhere? {error}") from error
    if _is_alike(mesh, text):  # nearly always, and a tenth of the bytes, unpickled, are enough to know
        return dict.fromkeys(range(mesh.size()), text[:MESSAGE_LETTERS])
    told: list[str] = [""] * mesh.size()
    dist.all_gather_object(told, text[:MESSAGE_LETTERS])
    return dict(enumerate(told))


def _is_alike(mesh: DeviceMesh, text: str) -> bool:
    """Whether all ranks have this text, by its digest."""
    device = "cpu" if backend_of("cpu") == "gloo" else mesh.device_type
    mine = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8).to(device)
    theirs = [torch.empty_like(mine) for _ in range(mesh.size())]
    dist.all_gather(theirs, mine)
    return bool((torch.stack(theirs) == mine).all())


def backend_of(device_type: str) -> str:
    """What carries tensors of such devices between ranks; "": nothing does."""
    return dict(pair.split(":") for pair in dist.get_backend_config().split(",")).get(device_type, "")


class Company:
    """The ranks of a mesh while they run a call together: who waits for another learns that it failed.

    All make the same calls in the same order, so a call is known by its number. A failure is written where torch's
    processes meet (their store), where those look that wait.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._rank, self._size = mesh.get_rank(), mesh.size()
        self._is_gloo = backend_of(mesh.device_type) == "gloo"
        store = dist.PrefixStore("tandem", dist.distributed_c10d._get_default_store())
        # models on one mesh count calls of their own; ranks make these in the same order, once all have the weights
        self._store = dist.PrefixStore(str(store.add(f"companies of {self._rank}", 1)), store)
        self._calls = self._depth = 0
        self._lost: str | None = None  # why nothing can run any more

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around what all ranks run.

        Raises:
            RuntimeError: a rank failed here and others did not, now or before: some may still wait for it, or have
                gone on. Nothing runs on this mesh any more.
        """
        self.check()
        self._calls, self._depth = self._calls + 1, self._depth + 1
        try:
            yield
        except Exception as error:
            if self._size > 1 and self._lost is None:
                text = f"{type(error).__name__}: {error}"[:MESSAGE_LETTERS]
                self._store.set(self._key(self._rank), text)
                if not self._all_failed():
                    self._lost = f"rank {self._rank} failed alone in the middle of a call: {text}"
            raise
        finally:
            self._depth -= 1

    def check(self) -> None:
        """Raises RuntimeError once nothing runs on this mesh any more; who asked the others would wait for ever."""
        if self._lost is not None:
            raise RuntimeError(f"{self._lost}. The ranks are out of step: start them again.")

    def finish(self, work: dist.Work | None) -> None:
        """Wait for a collective that was begun.

        Raises:
            RuntimeError: a rank failed in this call, with what was raised there; or nothing came for ``WAIT_S``.
        """
        if work is None:  # this rank has no part in it
            return
        if not self._is_gloo:
            work.wait()
            return
        until = time.monotonic() + WAIT_S
        while True:
            try:
                work.wait(timedelta(seconds=LOOK_S))
                return
            except RuntimeError as error:
                if failed := self._failed():
                    self._lost = failed
                elif work.is_completed():
                    self._lost = f"a rank is gone: {error}"
                elif time.monotonic() > until:
                    self._lost = f"nothing came from the other ranks for {WAIT_S:g} s. Did one of them fail?"
                else:
                    continue
                raise RuntimeError(self._lost) from error

    def _key(self, rank: int) -> str:
        return f"{self._calls}/{rank}"

    def _failed(self) -> str | None:
        for rank in range(self._size) if self._depth else ():
            if rank != self._rank and self._store.check([self._key(rank)]):
                return f"rank {rank} failed in the middle of a call: {self._store.get(self._key(rank)).decode()}"
        return None

    def _all_failed(self) -> bool:
        until = time.monotonic() + GRACE_S
        keys = [self._key(rank) for rank in range(self._size)]
        while time.monotonic() < until:
            if self._store.check(keys):
                return True
            time.sleep(0.02)
        return False
