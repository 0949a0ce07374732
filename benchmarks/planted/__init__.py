"""Bugs invented from the models' source alone, without a look at ``parity``'s own mutants; see ../bench_planted.py."""

from benchmarks.planted import around, dense, life, sight, sparse
from benchmarks.planted.plant import Bug

BUGS: tuple[Bug, ...] = (*dense.BUGS, *sparse.BUGS, *around.BUGS, *sight.BUGS, *life.BUGS)
assert len({bug.name for bug in BUGS}) == len(BUGS), "two bugs share a name"
