"""A process that compiles: a request as JSON on stdin, what was found as JSON in a file. See ``parity.planning.plan``.

libtpu wants environment variables of its own before jax is imported, prints to stderr, and cannot be unloaded. It
compiles for minutes in C++, where no thread of Python is sure to run: so the kernel ends this process when the one that
asked has ended, however it did.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Every program asked for, at every depth: ``{"decode": [measured, ...], ...}``, and the versions that did it.

    Raises:
        ValueError: the mesh is not for this slice.
    """
    from importlib.metadata import version

    import jax

    from parity.planning.chips import chip_of
    from parity.planning.compiling import measured, mesh_on
    from parity.planning.depths import Shallow
    from parity.planning.meshes import Workload
    from parity.planning.subject import planned

    config = planned(request["subject"], request["quant"]).config
    load, chip, topology = Workload(**request["load"]), chip_of(request["chip"]), request["topology"]
    mesh = mesh_on(chip, topology, request["mesh"])
    found: dict[str, Any] = {"jax": jax.__version__, "libtpu": version("libtpu")}
    depths = [Shallow(depth=depth) for depth in request["depths"]]
    try:
        for program in request["programs"]:
            found[program] = [measured(config, program, load, mesh, depth) for depth in depths]
    except jax.errors.JaxRuntimeError as error:
        if mesh.size == chip.num_devices(topology) or "RET_CHECK" not in str(error):
            raise
        raise ValueError(chip.no_part(topology, mesh.size, str(error).splitlines()[0])) from error
    return found


def die_with(parent: int) -> None:
    """Have the kernel kill this process as soon as the one that started it is gone; libtpu is for Linux only.

    Args:
        parent: id of that process, which may be gone already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """Exit code 2: the request cannot be met, and stderr ends with the reason."""
    die_with(int(sys.argv[2]))
    from parity.planning.environment import prepare_environment

    prepare_environment()
    result = Path(sys.argv[1])
    try:
        found = answer(json.load(sys.stdin))
    except ValueError as error:
        result.write_text(json.dumps({"error": str(error)}), encoding="utf-8")
        return 2
    result.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
