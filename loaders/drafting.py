"""Which model a draft may be bound to, of both backends, and what it reads of that model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from loaders.spec import ModelConfig
from loaders.stage import Stage


class Drafted(Protocol):
    """What is asked of a model that holds a draft, or is to be drafted for."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def stage(self) -> Stage: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def quantizes_inputs(self) -> bool: ...
    @property
    def rounds_cache(self) -> bool: ...


def check_binding(ours: Drafted, theirs: Drafted, apart: Sequence[str]) -> None:
    """See that the draft of one model can run with the embedding and the head of another.

    Args:
        ours: whose draft it is.
        theirs: its target.
        apart: what else keeps them apart, of devices.
    Raises:
        ValueError: sizes, dtype, rounding, stage or devices differ, all at once; or the target's last stage has no
            embedding.
    """
    problems = []
    if ours.config != theirs.config:
        problems.append(f"the configs differ ({ours.config.architecture}, {theirs.config.architecture})")
    if ours.dtype != theirs.dtype:
        problems.append(f"the draft computes in {ours.dtype}, the target in {theirs.dtype}")
    if ours.quantizes_inputs != theirs.quantizes_inputs:
        problems.append("one quantises the inputs of layers, the other does not")
    if ours.rounds_cache != theirs.rounds_cache:
        problems.append("one rounds keys and values to FP8, the other does not")
    if dataclasses.replace(theirs.stage, mtp=True) != ours.stage:
        problems.append(f"the draft is of stage {ours.stage}, the target {theirs.stage}")
    if problems := [*problems, *apart]:
        raise ValueError(f"the draft does not fit: {'; '.join(problems)}. Nothing was bound.")
    if not theirs.stage.is_first and not theirs.stage.mtp and not theirs.config.tie_word_embeddings:
        raise ValueError("the target's last stage has no copy of the embedding: load it with mtp=True")


def shared_with(target: Drafted | None) -> dict[str, str]:
    """What a draft reads of its target, ``shared`` or ``copied``: a last stage keeps a copy of the first's embedding.

    None: it is bound to none, and has neither.
    """
    if target is None:
        return {"embed": "absent", "head": "absent"}
    is_one = target.stage.is_first or target.config.tie_word_embeddings
    return {"embed": "shared" if is_one else "copied", "head": "shared"}
