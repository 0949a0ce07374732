"""What a compiler is told beside the program: options of libtpu, which every other compiler refuses."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# What moves between HBM and VMEM must be used by more than 0.6 of its bytes; libtpu asks for half. A layer's cache that
# is fetched ahead, read, given a row and written back whole is used by just that half.
DECODE = {"xla_tpu_msa_inefficient_use_to_copy_ratio": "0.6"}

_log = logging.getLogger(__name__)


def platform_of(mesh: Mesh | None) -> str:
    """Where programs will run, as JAX calls it: on the mesh's devices, else where ``jax.default_device`` says.

    Empty: this process has none of the mesh's devices.
    """
    if mesh is not None:
        ours = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
        return ours[0].platform if ours else ""
    # of the scope it is asked in: a host with TPUs has a CPU too
    device: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def decode_options(mesh: Mesh | None) -> Mapping[str, str] | None:
    """``compiler_options`` of programs that add few tokens to a cache, for where they will run.

    None: not on a TPU, or its compiler has no such option (which is logged: a step then moves some percent more).
    """
    return accepted(mesh) if platform_of(mesh) == "tpu" else None


@functools.cache
def accepted(mesh: Mesh | None) -> Mapping[str, str] | None:
    """``DECODE`` if a program that is nothing compiles with it."""
    where = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    nothing = jax.jit(lambda: jnp.zeros(()), out_shardings=where, compiler_options=DECODE)
    try:
        nothing.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        _log.warning("decoding is compiled without %s: %s", DECODE, error)
        return None
    return DECODE
