"""In a program that runs as a rank: a group of all of them by a file, and what it answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from several import answer, asked


def run_as_rank(main: Callable[[dict[str, Any], int], dict[str, Any]]) -> None:
    """Answer with what ``main`` finds, given the job and the rank.

    The group is left standing, for a rank may wait in it for ever, and the process ends before Python is taken down:
    threads of gloo that still hold tensors then would abort it, now and then (pytorch #190489, #179291).
    """
    job, rank = asked()
    store = dist.FileStore(str(Path(job["directory"]) / "store"), job["count"])
    dist.init_process_group(job.get("backend", "gloo"), store=store, rank=rank, world_size=job["count"])
    with torch.no_grad():
        answer(job, rank, main(job, rank))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def part() -> None:
    """Leave the group, once all ranks have come so far."""
    dist.barrier()
    dist.destroy_process_group()
