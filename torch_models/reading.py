"""Parameters of a plan, read straight into the memory of whole ones, or of what a rank of a mesh holds of them."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

from loaders.reading.filling import Filling
from loaders.reading.plan import LoadPlan, LoadReport
from loaders.reading.scratch import Staging
from loaders.reading.shards import Shards, read_shards
from loaders.reading.whole import read_whole
from loaders.spec import ParamSpec
from torch_models.parallel import Parallel
from torch_models.storage import over_host


def read_params(
    filling: Filling, parallel: Parallel | None = None, *, staging: Staging | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read every planned parameter into host memory, one after the other as they are complete. None is kept here.

    Args:
        filling: accounts for what it has a plan of.
        parallel: on a mesh, of each parameter the part that is here, and no more; None: all of it.
        staging: as for ``read_whole``.
    Raises:
        CheckpointError: a file changed or cannot be read, or a tensor that was not asked for.
    """
    if parallel is None:
        whole = read_whole(filling, staging=staging)
        yield from map(_placed, whole)  # no loop, which would keep one while the next are read
    else:
        shards = read_shards(filling, staging=staging)
        yield from ((spec.name, parallel.joined(spec.name, _taken(parts))) for spec, parts in shards)


def dry_run(plan: LoadPlan, parallel: Parallel | None, staging: Staging) -> LoadReport:
    """Read everything that ``read_params`` would: whatever is wrong with it is raised.

    Args:
        plan: what to read.
        parallel: as for ``read_params``.
        staging: likewise; the writing that follows may be given the same.
    Raises:
        CheckpointError: as ``read_params``; or not everything arrived, or does not go together.
    """
    filling = Filling(dataclasses.replace(plan, phase="check"))
    deque(read_params(filling, parallel, staging=staging), maxlen=0)  # a loop would keep one while it reads on
    return filling.finish()


def _placed(one: tuple[ParamSpec, np.ndarray]) -> tuple[str, torch.Tensor]:
    spec, array = one
    return spec.name, over_host(array)


def _taken(parts: Shards) -> list[torch.Tensor]:
    """The parts in their order; they are the caller's from here on."""
    return [over_host(parts.pop(box)) for box in list(parts)]
