"""What libtpu and jax must be told before they are imported, where there is no TPU."""

from __future__ import annotations

import importlib.util
import os

from parity.errors import DeviceNotFound

# no metadata server to ask, no TPU to look for, several compilers at once, and no files of logs
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


def prepare_environment() -> None:
    """For this process, before jax is imported. ``tandem plan`` compiles in another one, so as not to change yours."""
    os.environ.update(ENVIRONMENT)


def check_installed() -> None:
    """Raises DeviceNotFound where the compiler, or jax, is not installed."""
    missing = [name for name in ("jax", "flax", "libtpu") if importlib.util.find_spec(name) is None]
    if missing:
        raise DeviceNotFound(
            f"{' and '.join(missing)} not installed, which compiling for a TPU takes: pip install '.[jax,tpu-compiler]'"
        )
