"""Checks while a load reads: each tensor arrives once, each parameter is complete, scales are positive and finite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from loaders.digest import tensor_digest
from loaders.errors import CheckpointError
from loaders.reading.parts import missing_parts, part_of
from loaders.reading.place import load_fused_expert_weights, weight_loader
from loaders.reading.plan import LoadPlan, LoadReport
from loaders.spec import ParamSpec, Placement

Read = TypeVar("Read", np.ndarray, list[np.ndarray])


class Filling:
    """Exactly-once accounting of a load: which tensor was written how often, which parameter is complete.

    Every load counts from nothing: one that is done, or failed half-way, leaves nothing that a second would trip over.
    """

    def __init__(self, plan: LoadPlan) -> None:
        self.plan = plan
        self._begin()

    def _begin(self) -> None:
        self._missing = {spec.name: len(spec.placements) for spec in self.plan.specs}
        self._seen: set[str] = set()
        self._digests: dict[str, str] = {}
        self._expected: dict[str, str] = {}
        self._bad_scales: list[str] = []

    def receive(self, tensors: Iterator[tuple[str, Read]]) -> Iterator[tuple[ParamSpec, Placement, Read, bool]]:
        """Pair every tensor with its place; True when it is the last its parameter waits for.

        They may come in any order, whole or as the parts of them that are held here. Redundant tied tensors are kept
        back as digests for ``finish``.

        Raises:
            CheckpointError: a tensor that was not planned, or came twice; says of which expert and shard.
        """
        self._begin()
        for name, array in tensors:
            if name in self._seen or (name not in self.plan.targets and name not in self.plan.verified):
                what = "was delivered twice" if name in self._seen else "was delivered but not asked for"
                raise CheckpointError(self.plan.checkpoint.source, [f"tensor {name!r} {what}{self._which(name)}"])
            self._seen.add(name)
            if name in self.plan.verified:
                self._digests[name] = _digest(array)
                continue
            spec, placement = self.plan.targets[name]
            self._missing[spec.name] -= 1
            yield spec, placement, array, self._missing[spec.name] == 0
            del array  # it may be all that keeps a parameter which the caller is done with

    def _which(self, name: str) -> str:
        if name not in self.plan.targets:
            return ""
        spec, placement = self.plan.targets[name]
        return f": {part_of(spec, [placement])}" if placement.index else ""

    def write(self, param: np.ndarray, spec: ParamSpec, placement: Placement, array: np.ndarray) -> None:
        """Put one tensor into its place of its parameter, fused or not."""
        is_stacked = len(spec.tensor_shape) + len(placement.index) == len(spec.shape)
        if spec.dtype == "F32":  # a scale: no float of a checkpoint has its dtype prescribed otherwise
            self._bad_scales += _scale_problems(placement.tensor, array)
            array = array.reshape(param[(*placement.index, ...)].shape)  # [] or [1]
            weight_loader(param, array, shard_id=placement.shard_id, expert_id=placement.expert_id)
        elif is_stacked and not spec.is_transposed:
            weight_loader(param, array, shard_id=placement.shard_id, expert_id=placement.expert_id)
        else:  # fused: the axes of experts and shards are merged in the tensor
            num_shards = int(spec.axes[1]) if spec.axes[1].isdigit() else 1
            load_fused_expert_weights(param, array, num_shards=num_shards, is_transposed=spec.is_transposed)

    def check(self, spec: ParamSpec, placement: Placement, parts: Sequence[np.ndarray]) -> None:
        """Take note of what cannot be right about a tensor whose parts were read straight into place."""
        if spec.dtype == "F32":
            self._bad_scales += [problem for part in parts[:1] for problem in _scale_problems(placement.tensor, part)]

    def complete(self, spec: ParamSpec, param: np.ndarray | Sequence[np.ndarray]) -> None:
        """Take note of a parameter, or of its parts here, as a redundant tied tensor must equal it; it is not kept."""
        if spec.name in self.plan.verified.values():
            self._expected[spec.name] = _digest(param)

    def finish(self, *, is_again: bool = False) -> LoadReport:
        """Check that everything arrived, scales can be, and redundant tied tensors equal what they are tied to.

        And that the JSON, by which all of it was understood, has not been replaced meanwhile.

        Args:
            is_again: the same was read before and found good, and the old weights are gone by now. These are of files
                that did not change, so what becomes of the JSON is no matter.
        Raises:
            CheckpointError: listing all that did not, or saying which file was.
        """
        problems = list(self._bad_scales)
        for spec in self.plan.specs:
            late = [placement for placement in spec.placements if placement.tensor not in self._seen]
            problems += missing_parts(spec, late, what="never delivered")
        problems += [f"tensor {name!r} was never delivered" for name in self.plan.verified if name not in self._seen]
        problems += [
            f"tie_word_embeddings is true, but {name!r} differs from {same_as!r}. Which one is meant?"
            " Set tie_word_embeddings to false to load both."
            for name, same_as in self.plan.verified.items()
            if name in self._digests and same_as in self._expected and self._digests[name] != self._expected[same_as]
        ]
        if problems:
            raise CheckpointError(self.plan.checkpoint.source, problems)
        if not is_again:
            self.plan.checkpoint.documents.check()
        return self.plan.report()


def _digest(array: np.ndarray | Sequence[np.ndarray]) -> str:
    parts = [array] if isinstance(array, np.ndarray) else array
    return " ".join(tensor_digest(part) for part in parts)


def _scale_problems(tensor: str, array: np.ndarray) -> list[str]:
    value = float(array.reshape(()))
    if value > 0 and np.isfinite(value):
        return []
    return [f"tensor {tensor!r} is {value}, expected a scale above zero and finite. Was it calibrated?"]
