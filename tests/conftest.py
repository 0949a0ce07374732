"""Settings of every test run. Nothing here imports a framework: tests of loaders must not pay for jax and torch."""

from __future__ import annotations

import gc
import os
from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import settings

CHECKOUT = Path(__file__).parents[1]
KNOWN_JAXLIBS = ("0.10.2",)
QUICK_TO_COMPILE = (  # measured: 16 s instead of 37 for a hybrid's programs
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)

# Read by the frameworks when they are imported, here or in a subprocess; what the caller has set wins.
for _name, _value in {
    "OMP_NUM_THREADS": "1",  # tensors are small and workers several: threads cost more than they give
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",  # also where there is a GPU, so that meshes of 8 are to be had everywhere
    "JAX_NUM_CPU_DEVICES": "8",
    "NPROC": "16",  # threads of XLA: with fewer than devices, collectives of 8 wait for each other for ever
    "JAX_COMPILATION_CACHE_DIR": str(CHECKOUT / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    # a test compiles for seconds and runs for milliseconds; which flags there are depends on jaxlib
    **({"XLA_FLAGS": " ".join(QUICK_TO_COMPILE)} if version("jaxlib") in KNOWN_JAXLIBS else {}),
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


@pytest.hookimpl(tryfirst=True)  # before -m leaves any out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``slow_unless(pattern, ...)``: of a test's cases those whose id fits no pattern are slow."""
    ids, patterns = defaultdict(set), {}
    for item in items:
        for mark in item.iter_markers("slow_unless"):
            test = item.nodeid.split("[")[0]
            ids[test].add(item.callspec.id)
            patterns[test] = mark.args
            if not any(fnmatchcase(item.callspec.id, pattern) for pattern in mark.args):
                item.add_marker(pytest.mark.slow)
    if any("[" in argument for argument in config.args):  # single cases were asked for
        return
    for test, wanted in patterns.items():
        if idle := [pattern for pattern in wanted if not any(fnmatchcase(one, pattern) for one in ids[test])]:
            raise pytest.UsageError(f"{test}: slow_unless names no case by {idle}, there are {sorted(ids[test])}")


@pytest.fixture(scope="module")
def young_heap() -> Iterator[None]:
    """Collect and count what is made from here on: walking all that was imported takes a second, each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def eight_devices() -> None:
    """Of JAX; skips where there are fewer."""
    import jax

    if len(jax.devices()) < 8:
        pytest.skip(f"needs 8 devices, has {len(jax.devices())}; JAX_NUM_CPU_DEVICES=8 gives as many")
