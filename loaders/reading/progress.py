"""How far reading is: a bar with bytes, rate and time left, where a person looks on, and a line of the log for all."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

import numpy as np

log = logging.getLogger(__name__)

Read = TypeVar("Read", np.ndarray, list[np.ndarray])


def reported(
    tensors: Iterator[tuple[str, Read]], num_bytes: int, what: str, stream: TextIO | None = None, phase: str = "read"
) -> Iterator[tuple[str, Read]]:
    """The same tensors, whole or in the parts that are held here, counted as they pass.

    A bar is drawn if ``stream`` is a terminal and rich is installed (the extra ``progress``). What was read, how fast
    and how much of the time was the consumer's is logged at the end, also of what was abandoned.

    Args:
        tensors: pairs of name and array, or name and arrays.
        num_bytes: of all of them.
        what: is read, for people.
        stream: where the bar goes; default: stderr as it is now.
        phase: what the log calls it.
    """
    done, consumer_s, start = 0, 0.0, time.perf_counter()
    with _bar(num_bytes, what, sys.stderr if stream is None else stream) as advance:
        try:
            for name, array in tensors:
                num = array.nbytes if isinstance(array, np.ndarray) else sum(part.nbytes for part in array)
                left = time.perf_counter()
                yield name, array
                consumer_s += time.perf_counter() - left
                del array  # nobody holds it while the next one is read
                done += num
                advance(num)
        finally:
            seconds = time.perf_counter() - start
            log.info(
                "%s: %.3f of %.3f GB of %s in %.2f s, %.2f GB/s, and %.2f s to place them",
                phase,
                done / 1e9,
                num_bytes / 1e9,
                what,
                seconds - consumer_s,
                done / 1e9 / max(seconds - consumer_s, 1e-9),
                consumer_s,
            )


@contextmanager
def _bar(num_bytes: int, what: str, stream: TextIO | None) -> Iterator[Callable[[int], None]]:
    if not _is_terminal(stream) or importlib.util.find_spec("rich") is None:
        yield lambda num: None
        return
    rich = importlib.import_module("rich.progress")
    columns = [rich.TextColumn("{task.description}"), rich.BarColumn(), rich.DownloadColumn()]
    columns += [rich.TransferSpeedColumn(), rich.TimeRemainingColumn()]
    console = importlib.import_module("rich.console").Console(file=stream)
    # what a program prints meanwhile goes above the bar, but not where its output goes elsewhere
    is_shared = _is_terminal(sys.stdout)
    with rich.Progress(*columns, console=console, transient=True, redirect_stdout=is_shared) as progress:
        task = progress.add_task(what, total=num_bytes)
        yield lambda num: progress.advance(task, num)


def _is_terminal(stream: TextIO | None) -> bool:
    """A process may have no stderr (None), or one that is closed, or something in its place."""
    try:
        return stream is not None and stream.isatty()
    except (AttributeError, ValueError):
        return False
