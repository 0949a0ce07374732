"""Which model a draft may be bound to, of both backends, what it reads of that model, and what it is called with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from loaders.host.inputs import ModelInputs, as_array, check_pairs
from loaders.host.multimodal import TEXT, TYPES, check_inputs, placeholders, shown_of
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


def check_drafted(
    target: Drafted, input_ids: Any, attention_mask: Any, position_ids: Any, given: Mapping[str, Any]
) -> ModelInputs:
    """Check and complete what a draft is called with; see ``loaders.host.multimodal.check_inputs``.

    It reads every token's embedding, and a picture's are made by the tower, on the first stage of a pipeline. The draft
    of a later one reads text.

    Raises:
        ValueError: as ``check_inputs``; no token has one before it; or it is a later stage's, and tokens stand for
            pictures, or ``mm_token_type_ids`` does not say that they are none.
    """
    stage, vision = target.stage, target.config.vision
    blind = vision if stage.vision and not stage.has_tower else None  # what pictures are shown as, and not seen
    why = (
        f"the draft of stage {stage.index} of {stage.count} has no embeddings of them: the tower is on stage 0. Load"
        " the model whole"
    )
    if blind and (shown := shown_of(given, as_array("input_ids", input_ids).shape)):
        raise ValueError(f"{', '.join(shown)} given, but {why}.")
    inputs = check_inputs(
        target.config, input_ids, attention_mask, position_ids, given=given, has_tower=stage.has_tower
    )
    check_pairs(inputs)
    if blind and given.get(TYPES) is None:
        types_BT, _ = placeholders(blind, inputs.input_ids, None)
        if count := int(((types_BT != TEXT) & inputs.attention_mask).sum()):
            raise ValueError(
                f"input_ids has {count} tokens that stand for images or videos, but {why}; or say by {TYPES} that all"
                " are text."
            )
    return inputs
