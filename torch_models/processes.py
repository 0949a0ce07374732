"""Ranks of a mesh (torch.distributed): each holds its part of every parameter and runs the same calls.

What one of them cannot do none of them does: an error of one is raised by all. A rank that failed on its own, in the
middle of a call or elsewhere, leaves others waiting for it: see ``torch_models.coordination``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch.distributed.device_mesh import DeviceMesh

from loaders.host import agreement
from loaders.host.agreement import Result
from torch_models.coordination import coordinator


def together(mesh: DeviceMesh | None, work: Callable[[], Result]) -> Result:
    """What ``work`` returns, if it succeeds on every rank.

    Args:
        mesh: of all processes, all of which have to call this; None: this one alone.
        work: asks the others for nothing, or for the same as they ask, whether it fails or not.
    Raises:
        Exception: as ``work`` does here.
        RuntimeError: it failed on another rank only, with what was raised there; or one is gone, or does not come.
    """
    return agreed(mesh, "", work, lambda _: "")


def agreed(
    mesh: DeviceMesh | None, what: str, work: Callable[[], Result], say: Callable[[Result], str] = str
) -> Result:
    """What ``work`` returns, if all ranks of a mesh make the same of it. Without a mesh nothing is asked.

    Args:
        mesh: of all processes, all of which have to call this.
        what: has to be the same.
        work: as for ``together``.
        say: what it has come to on this rank, in few words.
    Raises:
        ValueError: the ranks say different things; so do all of them. Or as ``together``.
    """
    if mesh is None:
        return work()
    with coordinator().call(), coordinator().telling():
        return agreement.agreed(partial(told_by_all, mesh), what, work, say, words=("rank", "ranks"))


def check_alike(mesh: DeviceMesh | None, what: str, say: Callable[[], str]) -> str:
    """What all ranks of a mesh say alike; without a mesh nothing: nobody is asked, nor ``say`` called.

    Raises:
        ValueError: as ``agreed``.
    """
    return "" if mesh is None else agreed(mesh, what, say)


def told_by_all(mesh: DeviceMesh, text: str) -> dict[int, str]:
    """Every rank's text, shortened, by its number; see ``torch_models.coordination.Coordinator.told``."""
    with coordinator().call():
        return coordinator().told(text, mesh.device_type)
