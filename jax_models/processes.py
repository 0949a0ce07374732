"""A mesh of several processes (``jax.distributed``): each holds its part of every array and runs the same program.

What one of them cannot do none of them does: an error of one is raised by all, so that no process waits for ever for
another one, and no two serve different weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding

from jax_models.coordination import leave, times_together, told_by
from loaders.digest import short_digest
from loaders.host import agreement
from loaders.host.agreement import Result


def processes_of(mesh: Mesh | None) -> list[int]:
    """Indices of the processes whose devices a mesh is of; without one, this process alone."""
    if mesh is None:
        return [jax.process_index()]
    return sorted({device.process_index for device in mesh.devices.flat})


def devices_of(array: jax.Array) -> list[Any]:
    """In the order of its sharding: to a program the same devices in another one are others."""
    return list(array.sharding.devices_indices_map(array.shape))


def check_here(mesh: Mesh | None) -> None:
    """Raises ValueError where a mesh has no device of this process."""
    if jax.process_index() not in processes_of(mesh):
        raise ValueError(
            f"the mesh has devices of processes {processes_of(mesh)}, expected some of this one, {jax.process_index()}."
            " Load it on those."
        )


def to_host(array: jax.Array) -> np.ndarray:
    """All of an array, on this host.

    Where several processes hold parts of it, all of them have to ask for it, and for others in the same order.
    """
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def placed(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """A host array, the same on all processes, as the parts of it that their devices hold.

    Of several processes ``jax.device_put`` would gather all copies to compare them, and to it NaN is not NaN.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def handed_over(array: jax.Array, mesh: Mesh | None, what: str) -> np.ndarray:
    """All of an array of other devices than a mesh's, or of the same in another order, on every host of the mesh.

    JAX moves nothing between meshes of several processes. All of them have to call this.

    Raises:
        ValueError: it lies on devices of other processes than the mesh; ``what``: it is called.
    """
    theirs = sorted({device.process_index for device in array.sharding.device_set})
    if not array.is_fully_addressable and theirs != processes_of(mesh):
        raise ValueError(
            f"{what} lies on devices of processes {theirs}, the model on those of {processes_of(mesh)}. Bring it to the"
            " host there (jax.experimental.multihost_utils.process_allgather), and hand that over on all."
        )
    return to_host(array)


def together(mesh: Mesh | None, work: Callable[[], Result]) -> Result:
    """What ``work`` returns, if it succeeds on every process of the mesh.

    Args:
        mesh: of the processes; all of them have to call this.
        work: asks the others for nothing, or for the same as they ask, whether it fails or not.
    Raises:
        Exception: as ``work`` does here.
        RuntimeError: it failed on another process only; with what was raised there.
    """
    return agreed(mesh, "", work, lambda _: "")


def agreed(mesh: Mesh | None, what: str, work: Callable[[], Result], say: Callable[[Result], str] = str) -> Result:
    """What ``work`` returns, if all processes of a mesh make the same of it. With one process nothing is asked.

    Args:
        mesh: of the processes; all of them have to call this.
        what: has to be the same.
        work: as for ``together``.
        say: what it has come to on this process, in few words.
    Raises:
        ValueError: the processes say different things; so do all of them. Or as ``together``.
    """
    if len(processes := processes_of(mesh)) == 1:
        return work()

    has_told = False

    def tell(text: str) -> dict[int, str]:
        nonlocal has_told
        has_told = True
        return told_by(processes, text)

    try:
        return agreement.agreed(tell, what, work, say, words=("process", "processes"))
    except BaseException as error:
        if not has_told:  # it was interrupted
            leave(processes, error)
        raise


def check_alike(mesh: Mesh | None, what: str, say: Callable[[], str]) -> str:
    """What all processes of a mesh say alike; with one process nothing: nobody is asked, nor ``say`` called.

    Raises:
        ValueError: as ``agreed``.
    """
    return agreed(mesh, what, say) if len(processes_of(mesh)) > 1 else ""


def nth_change(mesh: Mesh | None) -> str:
    """Tells apart changes of models on a mesh of several processes, alike on all that have just agreed; "" with one.

    Of arrays that each holds a part of nobody knows all values, and two changes are to be told apart all the same.
    """
    processes = processes_of(mesh)
    return f"change {times_together(processes)}" if len(processes) > 1 else ""


def content_of(*arrays: Any) -> str:
    """Arrays in few words, for ``agreed``; of one that each process has but a part of, its shape."""

    def here(array: Any) -> np.ndarray:
        is_shared = isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated)
        return np.array(array.shape) if is_shared else np.asarray(array)

    return short_digest(*map(here, arrays))


def told_by_all(mesh: Mesh | None, text: str) -> dict[int, str]:
    """Every process's text, shortened, by its index; all of the mesh have to call this.

    Raises:
        RuntimeError: see ``jax_models.coordination.told_by``.
    """
    processes = processes_of(mesh)
    return {jax.process_index(): text} if len(processes) == 1 else told_by(processes, text)
