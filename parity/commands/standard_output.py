"""Results that are asked for where this process prints (``--json /dev/stdout``): there they are alone."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout

from parity.commands.options import OutputFile
from parity.whole_file import is_stdout


def results_alone(args: argparse.Namespace) -> AbstractContextManager[object]:
    """Around a verb: what is said besides such results is printed as errors."""
    is_asked = any(isinstance(value, OutputFile) and is_stdout(value) for value in vars(args).values())
    return redirect_stdout(sys.stderr) if is_asked else nullcontext()
