"""Any JAX function of weights and inputs as a ``parity.Backend``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parity.backend import BackendInfo, Inputs
from parity.backends import open_backend


def path_name(path: tuple[Any, ...]) -> str:
    """The path of a leaf in a pytree, as a checkpoint would spell it: keys and indices with dots between."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


@dataclass(frozen=True, kw_only=True)
class JaxFunction:
    """``function(weights, **inputs)``, jitted or not.

    Attributes:
        function: returns logits [B, T, V], or a mapping from trace names to arrays with ``logits`` among them. Hidden
            states have to be returned: nothing can be hooked into a compiled program.
        params: any pytree.
        name: what reports call it.
        dtype: what it computes in; default: of the first floating point leaf.
        checkpoint: where its weights are from, for the reader.
        checkpoint_name: pytree path -> checkpoint tensor name; default: keys with dots between. None: the weights
            cannot be named, say because they are stacked.
        precision: flags in force beside JAX's own, see ``parity.trace.make_meta``.
    """

    function: Callable[..., Any]
    params: Any
    name: str = "jax function"
    dtype: str | None = None
    checkpoint: str = ""
    checkpoint_name: Callable[[tuple[Any, ...]], str] | None = path_name
    precision: Mapping[str, Any] = field(default_factory=dict)

    @property
    def info(self) -> BackendInfo:
        dtypes = map(jnp.result_type, jax.tree.leaves(self.params))
        dtype = self.dtype or next((str(one) for one in dtypes if jnp.issubdtype(one, jnp.floating)), None)
        if dtype is None:
            raise ValueError(f"{self.name}: no leaf of params is a float, so say what it computes in: dtype='float32'")
        framework = open_backend("jax")
        flags = framework.precision(dtype)
        if dtype == "float32" and flags["jax_default_matmul_precision"] != "highest" and jax.default_backend() != "cpu":
            flags["matmul"] = "reduced"  # our own models ask for the highest; a function may not
        return BackendInfo(
            name=self.name,
            dtype=dtype,
            device=framework.device,
            versions=framework.versions(),
            precision={**flags, **self.precision},
            checkpoint=self.checkpoint,
        )

    def run(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """What the function returns, on the host; floats narrower than float32 as float32."""
        found = self.function(self.params, **{name: jnp.asarray(array) for name, array in inputs.items()})
        named = dict(found) if isinstance(found, Mapping) else {"logits": found}
        return {name: _on_host(array) for name, array in named.items()}

    def weights(self) -> Iterator[tuple[str, np.ndarray]] | None:
        """Every leaf by its checkpoint name, in its own dtype."""
        if (name := self.checkpoint_name) is None:
            return None
        return ((name(path), np.asarray(leaf)) for path, leaf in jax.tree.leaves_with_path(self.params))


def _on_host(array: Any) -> np.ndarray:
    host = np.asarray(array)
    return host if host.dtype.kind in "iub" or host.dtype == np.float64 else host.astype(np.float32)
