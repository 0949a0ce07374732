"""What is quantised at once: the matrices of a group, and what of the plain checkpoint they take.

Those of one group share a scale, which is of the largest of all, so none is computed before all of them are read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np

from loaders.checkpoint import Checkpoint
from loaders.quantization.quantizable import Matrix
from loaders.reading.lots import Unit, joined, lots_of

Content = TypeVar("Content", np.ndarray, list[np.ndarray])
Gathered = tuple[str, Content | None, dict[str, np.ndarray | None] | None]


class Place(NamedTuple):
    """What a tensor of the result is: a leaf, ``weight_scale`` for one, of a matrix."""

    matrix: Matrix
    leaf: str


@dataclass(frozen=True)
class Groups:
    """The matrices of a checkpoint by the names of their tensors, before and after, and by their group.

    Attributes:
        plain: the checkpoint before.
        matrices: what is quantised, by module.
        leaves: of each, the last words of its tensors' names after.
    """

    plain: Checkpoint
    matrices: Mapping[str, Matrix]
    leaves: tuple[str, ...]

    @cached_property
    def places(self) -> dict[str, Place]:
        """By tensor, of those that are computed."""
        matrices = self.matrices.values()
        return {f"{matrix.module}.{leaf}": Place(matrix, leaf) for matrix in matrices for leaf in self.leaves}

    @cached_property
    def members(self) -> dict[str, list[Matrix]]:
        """By group."""
        return _by([matrix.group for matrix in self.matrices.values()], self.matrices.values())

    @cached_property
    def users(self) -> dict[str, list[Matrix]]:
        """By plain tensor, the matrices in it."""
        return _by([matrix.tensor for matrix in self.matrices.values()], self.matrices.values())

    def of(self, names: Iterable[str]) -> set[str]:
        """The groups that some of these tensors are of."""
        return {self.places[name].matrix.group for name in names if name in self.places}

    def tensors(self, group: str) -> list[str]:
        """Of the result: what a group becomes."""
        return [f"{matrix.module}.{leaf}" for matrix in self.members[group] for leaf in self.leaves]

    def plain_tensors(self, group: str) -> set[str]:
        """Of the checkpoint before: what a group is made of."""
        return {matrix.tensor for matrix in self.members[group]}

    def passing(self, names: Iterable[str]) -> dict[str, int]:
        """The plain tensors of every group of these; each with the bytes that all take which are held with it."""
        found: dict[str, int] = {}
        for one in joined(Unit(tensors, tensors) for tensors in map(self.plain_tensors, self.of(names))):
            turned = (self._turned_bytes(matrix) for name in one.names for matrix in self.users[name])
            size = sum(self.plain.tensors[name].num_bytes for name in one.names) + max(turned)
            found |= dict.fromkeys(one.names, size)
        return found

    def _turned_bytes(self, matrix: Matrix) -> int:
        """Of what is turned before it is quantised, one expert at a time."""
        if not matrix.is_transposed:
            return 0
        return self.plain.tensors[matrix.tensor].num_bytes // self.plain.stored_shape(matrix.tensor)[0]

    def plain_lots(self, lots: Iterable[Collection[str]]) -> list[set[str]]:
        """The plain tensors that each lot takes, in lots of their own; those that share one are one."""
        units = []
        for lot in lots:
            taken = {name for name in lot if name not in self.places}.union(*map(self.plain_tensors, self.of(lot)))
            units.append(Unit(taken, taken))
        found: list[set[str]] = []
        for lot in joined(units):
            used = lot.names & self.users.keys()
            groups = {matrix.group for name in used for matrix in self.users[name]}
            inner = [Unit(names, names) for names in map(self.plain_tensors, groups)]
            inner += [Unit({name}, {name}) for name in lot.names - used]
            found += lots_of(inner, {name: info.num_bytes for name, info in self.plain.tensors.items()})
        return found

    def gathered(self, stream: Iterator[tuple[str, Content]], chosen: Collection[str]) -> Iterator[Gathered[Content]]:
        """Plain tensors as they come; or a group, and its matrices by module, once all are there: None was not read.

        ``chosen``: tensors of the result, of whose groups nothing is left out.
        """
        groups = self.of(chosen)
        waiting: dict[str, dict[str, np.ndarray | None]] = {}
        for name, content in stream:
            if name not in self.users:
                yield name, content, None
                del content  # before the next one is read
                continue
            array = content if isinstance(content, np.ndarray) else next(iter(content), None)
            for matrix in self.users[name]:
                if matrix.group not in groups:
                    continue
                held = waiting.setdefault(matrix.group, {})
                held[matrix.module] = None if array is None else matrix.of(array)
                if len(held) == len(self.members[matrix.group]):
                    yield matrix.group, None, waiting.pop(matrix.group)
            del content, array


def _by(keys: Iterable[str], matrices: Iterable[Matrix]) -> dict[str, list[Matrix]]:
    found: dict[str, list[Matrix]] = {}
    for key, matrix in zip(keys, matrices, strict=True):
        found.setdefault(key, []).append(matrix)
    return found
