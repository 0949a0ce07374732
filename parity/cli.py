"""The command ``tandem``: one verb, one module. ``tandem --help`` imports none of them."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import TextIO

from parity.commands.options import check_outputs
from parity.commands.standard_output import results_alone
from parity.errors import DeviceNotFound, NotComparable

# verb, module, one line of help. A module has add_arguments(parser) and run(args) -> exit code; it imports what is
# heavy inside run, so that a verb costs only what it uses.
VERBS: tuple[tuple[str, str, str], ...] = (
    ("demo", "parity.commands.demo", "every lifecycle event on both backends, on two small checkpoints, with a report"),
    ("inspect", "parity.commands.inspect", "what a checkpoint holds, and what would be loaded where"),
    ("plan", "parity.commands.plan", "compile for a TPU that is not there: does it fit, what moves, how fast at best"),
    ("record", "parity.commands.record", "run one backend and write a trace"),
    ("run", "parity.commands.run", "record two backends and the oracle, and compare"),
    ("export", "parity.commands.export", "load a checkpoint and write its tensors back, bit for bit"),
    ("quantize", "parity.commands.quantize", "write a checkpoint in NVFP4, as ModelOpt does"),
    ("generate", "parity.commands.generate", "continue a prompt of token ids"),
    ("compare", "parity.commands.compare", "compare two traces: rounding or bug, where, and whose?"),
    ("weights", "parity.commands.weights", "weight by weight: disk, JAX, torch and traces, digest against digest"),
    ("bisect", "parity.commands.bisect", "which layer, module and operation differs, and on which side"),
    ("lifecycle", "parity.commands.lifecycle", "take live models through every change, and check each"),
    ("mutate", "parity.commands.mutate", "plant bugs on purpose, and count how many are caught"),
)

EXIT_CODES = (
    "exit codes: 0 pass, 1 differs, 2 usage, bad input or a crash, 3 not comparable, 4 inconclusive, 5 no such device,"
    " 130 interrupted"
)
BAD_INPUT, NOT_COMPARABLE, NO_DEVICE = 2, 3, 5
INTERRUPTED = 128 + signal.SIGINT  # as shells count it
# in what frameworks raise where there is not enough of it, each in an exception of its own
_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate|RESOURCE_EXHAUSTED", re.IGNORECASE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # the terminal's encoding may lack letters of a path
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
    parser = build_parser(given)
    if not given:
        parser.print_help()
        return BAD_INPUT
    try:
        args = parser.parse_args(given)
    except SystemExit as stop:  # argparse has said what is wrong, or printed the help that was asked for
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    try:
        check_outputs(args)
        with results_alone(args):
            code = args.run(args)
        if sys.stdout is not None:  # as it is where it was closed (`>&-`)
            sys.stdout.flush()  # here, and not when Python ends, where nobody could tell
        return code
    except BrokenPipeError as error:  # who read what is printed is gone; files that were asked for are written before
        _give_up(sys.stdout)
        return _told(args.verb, error)
    except KeyboardInterrupt:
        with suppress(OSError):
            print(f"tandem {args.verb}: interrupted", file=sys.stderr, flush=True)
        if argv is None:  # a shell that runs a loop has to know; and compilers at work may crash where Python ends
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - of a crash Python's own exit code is 1, which is "differs" here
        return _told(args.verb, error)


def _told(verb: str, error: Exception) -> int:
    """Say what went wrong, with a traceback if nobody expected it, and return the code for it."""
    text, is_expected = str(error), isinstance(error, ValueError | OSError | DeviceNotFound)
    try:
        if isinstance(error, MemoryError) or (not is_expected and _MEMORY.search(text)):
            text = f"there is not enough memory. {text.partition(chr(10))[0]}"
        elif not is_expected:
            traceback.print_exc()
        print(f"tandem {verb}: {text}", file=sys.stderr)
    except OSError:  # nobody can be told but by the code
        _give_up(sys.stderr)
    if isinstance(error, DeviceNotFound):
        return NO_DEVICE
    return NOT_COMPARABLE if isinstance(error, NotComparable) else BAD_INPUT


def _give_up(stream: TextIO | None) -> None:
    """What it could not print goes nowhere: Python would try once more when it ends, and end with a code of its own."""
    if stream is not None and stream in (sys.__stdout__, sys.__stderr__):  # others are not the process's
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def build_parser(given: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser; only the verb that was given has its module imported and its arguments added."""
    parser = argparse.ArgumentParser(
        prog="tandem", description="One checkpoint, two backends, live weights.", epilog=EXIT_CODES
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, module, line in VERBS:
        sub = verbs.add_parser(verb, help=line, description=line, epilog=EXIT_CODES)
        if verb in given[:1]:
            command = import_module(module)
            command.add_arguments(sub)
            sub.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
