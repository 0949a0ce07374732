"""What the processes of a mesh tell each other, where JAX's processes meet: its coordination service.

No device takes part in it. So it works whatever meshes, guards and compilers they have, and those that do not come are
known by their number.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax

WAIT_S = 600.0  # for processes that do not come
MESSAGE_LETTERS = 4096
_GAVE_UP = "!"  # before what is said by one that takes no part
_TIMES: dict[tuple[int, ...], int] = {}  # how often these processes have come together


def told_by(processes: Sequence[int], text: str) -> dict[int, str]:
    """Every process's text, its first ``MESSAGE_LETTERS``, by its index. All of them have to call this.

    Raises:
        RuntimeError: one did not come within ``WAIT_S``, or gave up itself, as where it was interrupted.
    """
    here = tuple(processes)
    _say(here, text[:MESSAGE_LETTERS])
    try:
        told = _read(here)
    except BaseException as error:
        # those that are yet to come must not take it that this one goes on
        _say(here, f"{_GAVE_UP}gave up: {type(error).__name__}", again=True)
        raise
    if gone := {process: said for process, said in told.items() if said.startswith(_GAVE_UP)}:
        raise RuntimeError("; ".join(f"process {process} {said[len(_GAVE_UP) :]}" for process, said in gone.items()))
    return told


def leave(processes: Sequence[int], error: BaseException) -> None:
    """Take no part in what the others come together for next, and do not wait for them: they are told of it."""
    _say(tuple(processes), f"{_GAVE_UP}gave up: {type(error).__name__}")


def times_together(processes: Sequence[int]) -> int:
    """How often they have come together, which all count alike."""
    return _TIMES.get(tuple(processes), 0)


def _say(here: tuple[int, ...], text: str, *, again: bool = False) -> None:
    service, me = _service(), jax.process_index()
    if not again:
        _TIMES[here] = _TIMES.get(here, 0) + 1
        # all have come to the time before, so nobody reads any more what was said before that
        service.key_value_delete(f"{_place(here, _TIMES[here] - 2)}{me}")
    service.key_value_set(f"{_place(here, _TIMES[here])}{me}", text, allow_overwrite=again)


def _read(here: tuple[int, ...]) -> dict[int, str]:
    """What all have said, this time."""
    service, place = _service(), _place(here, _TIMES[here])
    until = time.monotonic() + WAIT_S
    while True:
        found = {int(key.rpartition("/")[2]): said for key, said in service.key_value_dir_get(place)}
        if not (missing := [process for process in here if process not in found]):
            return {process: found[process] for process in here}
        try:
            left_ms = int((until - time.monotonic()) * 1000)
            service.blocking_key_value_get(f"{place}{missing[0]}", max(left_ms, 1))
        except jax.errors.JaxRuntimeError as error:
            raise RuntimeError(
                f"processes {missing} of {list(here)} did not come within {WAIT_S:g} s. Did one fail elsewhere, or does"
                f" it something else? ({str(error).partition(' [')[0]})"
            ) from error


def _place(here: tuple[int, ...], times: int) -> str:
    return f"tandem/{'-'.join(map(str, here))}/{times}/"


def _service() -> Any:
    from orbax.checkpoint import multihost  # half a second, for several processes alone

    return multihost.get_jax_distributed_client()
