"""Settings of every test run. Nothing here imports a framework: tests of loaders must not pay for jax and torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

CHECKOUT = Path(__file__).parents[1]

# Read by the frameworks when they are imported, here or in a subprocess; what the caller has set wins.
for _name, _value in {
    "OMP_NUM_THREADS": "1",  # tensors are small and workers several: threads cost more than they give
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",  # also where there is a GPU, so that meshes of 8 are to be had everywhere
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_COMPILATION_CACHE_DIR": str(CHECKOUT / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}.items():
    os.environ.setdefault(_name, _value)
# for subprocesses that run elsewhere, where the project is not installed
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))

# The same examples on every machine and in every run; HYPOTHESIS_PROFILE=thorough looks for new ones.
settings.register_profile("steady", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("thorough", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


def pytest_configure(config: pytest.Config) -> None:
    # JAX writes cache entries in place, so another worker may read half of one; it warns and compiles instead
    for what in ("reading", "writing"):
        config.addinivalue_line("filterwarnings", f"ignore:Error {what} persistent compilation cache entry")
