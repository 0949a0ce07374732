"""Models run on the devices of their weights, whatever ``jax.set_mesh`` says around the call.

Programs are compiled for the mesh that a model was loaded for, whose axes are of type Auto, or for one device. Where
another mesh is set, or the same with axes of type Explicit, as ``jax.make_mesh`` gives them, JAX refuses to run them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import Mesh

_NONE = Mesh(np.empty((), object), ())
Method = TypeVar("Method", bound=Callable[..., Any])


def on_own_mesh(method: Method) -> Method:
    """Of what has a ``mesh``, or None for one device; where no mesh is set, nothing is."""

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if jax.sharding.get_mesh().empty:
            return method(self, *args, **kwargs)
        with jax.set_mesh(_NONE if self.mesh is None else self.mesh):
            return method(self, *args, **kwargs)

    return cast("Method", called)
