"""An interrupt at any line of a file of ours."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def interrupting(module: str, at: Callable[[int], object]) -> Iterator[list[int]]:
    """``at(number)`` is called before each line of a file of ours is run, and may raise."""
    count = [0]

    def tracer(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.endswith(module):
            return None
        if event == "line":
            count[0] += 1
            at(count[0])
        return tracer

    sys.settrace(tracer)
    try:
        yield count
    finally:
        sys.settrace(None)


def interrupt_at(line: int) -> Callable[[int], None]:
    def at(number: int) -> None:
        if number == line:
            raise KeyboardInterrupt

    return at
