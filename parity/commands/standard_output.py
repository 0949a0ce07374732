"""Results that are asked for where this process prints (``--json /dev/stdout``): there they are alone."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path

from parity.commands.options import OutputFile


@contextmanager
def results_alone(args: argparse.Namespace) -> Iterator[None]:
    """Around a verb. Such results are written behind what is there already; what is said besides is printed as errors.

    Opened by its name a file would be emptied, and written to from its beginning, whatever was printed into it before.
    """
    asked = [name for name, value in vars(args).items() if isinstance(value, OutputFile) and _is_stdout(value)]
    if not asked:
        yield
        return
    stdout = sys.stdout
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in asked:
            setattr(args, name, OutputFile(directory / name))
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:  # also where what is said besides could not be printed
            stdout.flush()
            for name in asked:
                result = directory / name
                if result.exists():  # a verb that found nothing to write has said so
                    stdout.buffer.write(result.read_bytes())
            stdout.flush()


def _is_stdout(path: Path) -> bool:
    try:
        there, printed = os.stat(path), os.fstat(sys.stdout.fileno())
        return os.path.samestat(there, printed) and not os.path.samefile(path, os.devnull)
    except (OSError, ValueError):  # it is not there yet; or nothing is printed to a file
        return False
