"""One stage of a pipeline: which decoder layers, and whether it owns the embedding and the head."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Stage:
    """Stage ``index`` of ``count``; the whole model is stage 0 of 1.

    ``mtp``: the multi-token-prediction draft is asked for; the last stage holds it. ``vision``: so is the vision tower
    of a model that has one; the first stage holds it.
    """

    index: int = 0
    count: int = 1
    mtp: bool = False
    vision: bool = True

    def __post_init__(self) -> None:
        if not (type(self.index) is int and type(self.count) is int and 0 <= self.index < self.count):
            raise ValueError(f"stage=({self.index}, {self.count}) must be (index, count) with 0 <= index < count")

    @classmethod
    def of(cls, stage: Stage | tuple[int, int] | None, *, mtp: bool = False, vision: bool = True) -> Stage:
        """Accept what callers write: None for the whole model, or (index, count). Raises ValueError for others."""
        if isinstance(stage, Stage):
            return stage
        if stage is None:
            return cls(mtp=mtp, vision=vision)
        if not isinstance(stage, tuple | list) or len(stage) != 2:
            raise ValueError(f"stage={stage!r}, expected (index, count) of a pipeline, or None for the whole model")
        return cls(*stage, mtp=mtp, vision=vision)

    @property
    def whole(self) -> Stage:
        """The whole model, of which this is a stage."""
        return replace(self, index=0, count=1)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    @property
    def has_draft(self) -> bool:
        return self.mtp and self.is_last

    def holds_embedding(self, *, is_tied: bool) -> bool:
        """Whether this stage holds the embedding, which a tied head and a draft read too."""
        return self.is_first or (self.is_last and (is_tied or self.mtp))

    @property
    def has_tower(self) -> bool:
        """Whether this stage holds the vision tower of a model that has one."""
        return self.vision and self.is_first

    def check_entry(self, input_ids: object, hidden_states: object) -> None:
        """See that this stage is given what it takes, and nothing else. Raises ValueError."""
        if self.count == 1 and input_ids is None:
            raise ValueError("input_ids are missing")
        if self.count == 1 and hidden_states is not None:
            raise ValueError("hidden_states go to later stages of a pipeline, and this is the whole model")
        if self.is_first and (input_ids is None or hidden_states is not None):
            raise ValueError("this stage is the first of the pipeline: give input_ids, not hidden_states")
        if not self.is_first and (hidden_states is None or input_ids is not None):
            raise ValueError(f"stage {self.index} of {self.count} takes hidden_states, not input_ids")

    def layers(self, num_hidden_layers: int) -> range:
        """This stage's decoder layers; earlier stages take one more when the division leaves a rest.

        Raises:
            ValueError: more stages than layers, so a stage would be empty.
        """
        if self.count > num_hidden_layers:
            raise ValueError(
                f"{self.count} pipeline stages for {num_hidden_layers} decoder layers: at least one would be empty."
                f" Use at most {num_hidden_layers}."
            )
        size, rest = divmod(num_hidden_layers, self.count)
        start = self.index * size + min(self.index, rest)
        return range(start, start + size + (self.index < rest))
