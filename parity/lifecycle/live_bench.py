"""What a model under observation is held against: a cold load of what it must hold, on one backend.

The witness is written with the checkpoint writer alone, so no code that changes live weights has a part in it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from loaders import open_checkpoint
from loaders.checkpoint import Checkpoint
from loaders.digest import digests
from loaders.reading.plan import plan_load
from loaders.spec import Specs
from loaders.stage import Stage
from loaders.writing.writer import write_checkpoint
from parity.backends import Framework
from parity.zoo import prompts
from parity.zoo.pictures import pictures

NEW_TOKENS = 4
PROMPT_ROWS, PROMPT_TOKENS, PICTURE_TOKENS = 2, 12, 44
STEPS = 3  # decoded to compare logits
HALVES = ("embed", "head")


class LiveBackend(Protocol):
    """What is observed differently in JAX and in torch.

    Attributes:
        poison_publishes: whether poison is an event with a version (JAX) or an accident (torch).
        keeps_old: whether the model from before a change must go on as it was.
        captures: whether decoding is captured in graphs and the model can sleep (torch).
        stages_repeat: whether stages of a pipeline give the bits of the whole model (torch).
    """

    @property
    def backend(self) -> Framework: ...
    @property
    def poison_publishes(self) -> bool: ...
    @property
    def keeps_old(self) -> bool: ...
    @property
    def captures(self) -> bool: ...
    @property
    def stages_repeat(self) -> bool: ...
    def fixed(self, model: Any) -> dict[str, Any]: ...
    def compiled(self, model: Any) -> dict[str, int]: ...
    def not_shared(self, old: Any, new: Any, changed: set[str]) -> list[str]: ...
    def poison(self, model: Any) -> Any: ...
    def stepped(self, model: Any, prompt: Mapping[str, np.ndarray]) -> list[np.ndarray]: ...
    def replayed(self, model: Any, prompt: Mapping[str, np.ndarray]) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class Witness:
    """A cold load of one state: digests as the files have them, the rest as a new model computes it.

    ``drafted``: logits of the draft, None without one. ``steps``: logits of a prompt, and of decoding after it.
    """

    digests: dict[str, str]
    logits: np.ndarray
    tokens: np.ndarray
    drafted: np.ndarray | None
    steps: list[np.ndarray]


class Bench:
    """Checkpoints by letter, a prompt, and the witness of every state asked for so far, on one backend.

    Attributes:
        prompt: what is run again and again; models that see are shown something.
    """

    def __init__(self, live: LiveBackend, checkpoints: Mapping[str, Checkpoint], scratch: Path) -> None:
        self.live = live
        self.checkpoints = dict(checkpoints)
        self.scratch = scratch
        self.has_draft = all(map(has_draft, checkpoints.values()))
        stage = Stage(mtp=self.has_draft)
        plans = {letter: plan_load(checkpoint, stage) for letter, checkpoint in checkpoints.items()}
        self.specs: Specs = next(iter(plans.values())).specs
        self.tensors = {letter: tuple(plan.tensors) for letter, plan in plans.items()}
        self.left_out = {letter: plan.left_out for letter, plan in plans.items()}
        config = self.checkpoints["A"].config
        self.shows = config.vision is not None
        self.prompt: dict[str, np.ndarray] = (
            pictures(config, tokens=PICTURE_TOKENS, padding=None)
            if self.shows
            else prompts(config, rows=PROMPT_ROWS, tokens=PROMPT_TOKENS, padding=None)
        )
        self._same_as = {tied.tensor: tied.same_as for tied in self.specs.tied}
        self._witnesses: dict[tuple[tuple[str, str], ...], Witness] = {}
        self._in_float32: dict[str, np.ndarray] = {}

    @property
    def rows(self) -> int:
        return len(self.prompt["input_ids"])

    @property
    def halves(self) -> tuple[str, ...]:
        """What can be swapped: a quantised head cannot, its codes mean nothing without their scales."""
        return tuple(half for half in HALVES if half != "head" or "lm_head" not in self.specs.schemes)

    def path(self, letter: str) -> str:
        return str(self.checkpoints[letter].source)

    def load(self, uri: Any, stage: tuple[int, int] | None = None, *, in_float32: bool = False) -> Any:
        """``in_float32``: computed in it, with inputs as they come, so that no rounding decides what is near a tie."""
        exactly: dict[str, Any] = {"dtype": "float32", "weight_only": True} if in_float32 else {}
        return self.live.backend.load(uri, stage=stage, mtp=self.has_draft, **exactly)

    def logits(self, model: Any) -> np.ndarray:
        with self.live.backend.scope():
            return self.live.backend.to_numpy(model(**self.prompt))

    def logits_in_float32(self, letter: str) -> np.ndarray:
        """Of a checkpoint as it is, whatever it is served in; kept."""
        if letter not in self._in_float32:
            self._in_float32[letter] = self.logits(self.load(self.path(letter), in_float32=True))
        return self._in_float32[letter]

    def drafted(self, model: Any) -> np.ndarray | None:
        """Logits of the model's draft, None without one."""
        if not self.has_draft:
            return None
        with self.live.backend.scope():
            return self.live.backend.to_numpy(model.mtp_forward(**self.prompt)[0])

    def tokens(self, model: Any, draft: Any = None) -> np.ndarray:
        with self.live.backend.scope():
            options = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
            options |= {} if draft is None else {"draft": draft, "draft_tokens": 2}
            return self.live.backend.to_numpy(model.generate(**self.prompt, **options))

    def tensors_of_half(self, half: str, letter: str) -> list[str]:
        """Checkpoint tensors that a swap of one half changes; both of them where a tied head is shipped."""
        parameter = self.specs.embedding if half == "embed" else self.specs.head
        found = [placement.tensor for spec in self.specs if spec.name == parameter for placement in spec.placements]
        found += [tied.tensor for tied in self.specs.tied if tied.same_as == parameter]
        return [tensor for tensor in found if tensor in self.tensors[letter]]

    def half(self, half: str, letter: str) -> np.ndarray | None:
        """Embedding or head as the files have it, not as a model does; None for the head of a tied model."""
        if half == "head" and self.specs.head == self.specs.embedding:
            return None
        return self.checkpoints[letter].read(self.tensors_of_half(half, letter)[0])

    def witness(self, base: str, holds: Mapping[str, str]) -> Witness:
        """The cold load of ``holds`` (tensor -> letter), laid out like checkpoint ``base``."""
        key = tuple(sorted(holds.items()))
        if key not in self._witnesses:
            self._witnesses[key] = self._cold(base, holds)
        return self._witnesses[key]

    def _cold(self, base: str, holds: Mapping[str, str]) -> Witness:
        checkpoint = self.checkpoints[base]
        with tempfile.TemporaryDirectory(prefix="witness-", dir=self.scratch) as directory:
            if set(holds.values()) != {base}:

                def read(name: str) -> np.ndarray:
                    source = self.checkpoints[holds.get(name, base)]
                    # of two tied checkpoints only one may ship the redundant head: the embedding stands for it
                    return source.read(name if name in source.tensors else self._same_as[name])

                target = Path(directory) / "mixed"
                generation = checkpoint.generation_document or None
                write_checkpoint(
                    target, checkpoint.tensors, read, config=checkpoint.config_document, generation=generation
                )
                checkpoint = open_checkpoint(target)
            on_disk = digests(checkpoint.stream(names=holds))
            model = self.load(str(checkpoint.source))
            with self.live.backend.scope():
                steps = self.live.stepped(model, self.prompt)
            return Witness(on_disk, self.logits(model), self.tokens(model), self.drafted(model), steps)


def has_draft(checkpoint: Checkpoint) -> bool:
    """Whether it holds the draft that its config speaks of; some are saved without."""
    return checkpoint.config.num_mtp_layers > 0 and any(name.startswith("mtp.") for name in checkpoint.tensors)
