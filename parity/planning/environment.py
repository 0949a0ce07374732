"""What libtpu and jax must be told before they are imported, where there is no TPU."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import resource
from collections.abc import Iterator, Mapping

from parity.errors import DeviceNotFound

# no metadata server to ask, no TPU to look for, several compilers at once, no files of logs; what was compiled before
# is compiled again, for a report of its buffers comes of compiling alone; and programs are those of models, which run
# by their own settings (jax_models.ambient)
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_ENABLE_X64": "false",
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
}
# Its threads have 64 KiB of stack unless told, and use 70 over prefill of Qwen3.5-397B-A17B for tpu7x. A libtpu that
# does not know the flag passes over it.
_STACK = "fibers_default_thread_stack_size"
LIBTPU_FLAGS = f"--{_STACK}={2**22} --undefok={_STACK}"


def compiler_environment(given: Mapping[str, str]) -> dict[str, str]:
    """``given``, and what a process needs that compiles for TPUs; flags for libtpu that are given count as well."""
    flags = f"{LIBTPU_FLAGS} {given.get('LIBTPU_INIT_ARGS', '')}".strip()
    return {**given, **ENVIRONMENT, "LIBTPU_INIT_ARGS": flags}


def prepare_environment() -> None:
    """For this process, before jax is imported. ``tandem plan`` compiles in another one, so as not to change yours."""
    os.environ.update(compiler_environment(os.environ))


@contextlib.contextmanager
def deep_stack() -> Iterator[None]:
    """Processes started within may use all the stack they like: libtpu recurses through a program, 64 MiB and deeper.

    So it does over prefill of Qwen3.5's experts for tpu7x, and dies by SIGSEGV under the usual 8 MiB. A limit that may
    not be raised stays.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def check_installed() -> None:
    """Raises DeviceNotFound where the compiler, or jax, is not installed."""
    missing = [name for name in ("jax", "flax", "libtpu") if importlib.util.find_spec(name) is None]
    if missing:
        raise DeviceNotFound(
            f"{' and '.join(missing)} not installed, which compiling for a TPU takes:"
            " pip install '.[jax,tpu-compiler]' in Tandem's own directory"
        )
