"""Models run as they were loaded to, whatever JAX is set to around the call: where their weights are, and by the rules
of promotion that their layers were written for.

Programs are compiled for the mesh that a model was loaded for, whose axes are of type Auto, or for one device. Where
another mesh is set, or the same with axes of type Explicit, as ``jax.make_mesh`` gives them, JAX refuses to run them;
where promotion is forbidden, it refuses to compile them; where transfers are, to take a prompt from the host; and where
x64 is on, kernels get indices of 64 bits, which no TPU has. Of a seed the same tokens come, however JAX is told to make
random bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import Mesh

_NONE = Mesh(np.empty((), object), ())
Method = TypeVar("Method", bound=Callable[..., Any])


def with_transfers(function: Method) -> Method:
    """What brings weights to devices, or back, which it does also where ``jax.transfer_guard`` forbids transfers."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with jax.transfer_guard("allow"):
            return function(*args, **kwargs)

    return cast("Method", called)


def in_own_settings(method: Method) -> Method:
    """A method of what has a ``mesh``, None for one device, run by its own settings; set meshes are taken out."""

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as settings:
            settings.enter_context(jax.numpy_dtype_promotion("standard"))
            settings.enter_context(jax.numpy_rank_promotion("allow"))
            settings.enter_context(jax.transfer_guard("allow"))
            settings.enter_context(jax.enable_x64(False))
            settings.enter_context(jax.threefry_partitionable(True))
            if not jax.sharding.get_mesh().empty:
                settings.enter_context(jax.set_mesh(_NONE if self.mesh is None else self.mesh))
            return method(self, *args, **kwargs)

    return cast("Method", called)
