"""Anybody's torch module under observation: how it is loaded and run, and what must hold after every change.

It is held against a cold load of what it must hold now, bit for bit; its tensors may not move; and a replay of what was
recorded before the change, which does what a CUDA graph does, must say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from parity.lifecycle.live_model import expect, some
from torch_models.census import moved, pointer_census
from torch_models.recording import CannotCapture, Recording
from torch_models.storage import same_bits

Stream = Iterator[tuple[str, torch.Tensor]]  # as a weight iterator gives it: (checkpoint tensor name, tensor)
Checkpoint = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """How somebody's model is made, loaded and run. What is None is not offered, and its events are skipped.

    Attributes:
        make: a new module without weights, always of the same sizes.
        load: the first load and every reload: takes all tensors of a checkpoint, derives what it derives.
        run: logits of the module on a fixed input, which it keeps.
        partial: an update of some tensors alone. None: ``load`` must refuse them.
        buckets: a whole update in several parts.
        finish: what ``load`` does after the last tensor, once more.
        write: one tensor by its name, past the loader.
        weights: what the module holds, by checkpoint tensor name.
        nap: give up memory and take it back, with the weights as they were.
        halves: embedding and head, as tensors in checkpoint layout; swap: put others in their place.
        wrappers: (what wraps, what it wraps), of every layer that wraps another.
        reference: logits that a checkpoint must give, to within ``tolerance`` (relative).
        name: what reports call it.
    """

    make: Callable[[], nn.Module]
    load: Callable[[nn.Module, Stream], object]
    run: Callable[[nn.Module], torch.Tensor]
    partial: Callable[[nn.Module, Stream], object] | None = None
    buckets: Callable[[nn.Module, Iterable[Stream]], object] | None = None
    finish: Callable[[nn.Module], object] | None = None
    write: Callable[[nn.Module, str, torch.Tensor], object] | None = None
    weights: Callable[[nn.Module], Checkpoint] | None = None
    nap: Callable[[nn.Module], object] | None = None
    halves: tuple[str, str] | None = None
    swap: Callable[[nn.Module, torch.Tensor, torch.Tensor], object] | None = None
    wrappers: Callable[[nn.Module], Iterable[tuple[nn.Module, nn.Module]]] | None = None
    reference: Callable[[Checkpoint], torch.Tensor] | None = None
    tolerance: float = 1e-5
    name: str = "foreign"


def vllm_style(make: Callable[[], nn.Module], *inputs: torch.Tensor, **more: object) -> ForeignModel:
    """A module as vLLM has them: ``load_weights(iterator)``, then ``process_weights_after_loading()`` of every part.

    Args:
        make: as for ``ForeignModel``.
        inputs: what the module is called with.
        more: other fields of ``ForeignModel``.
    """

    def process(model: nn.Module) -> None:
        for part in model.modules():
            if callable(hook := getattr(part, "process_weights_after_loading", None)):
                hook()

    def load(model: nn.Module, stream: Stream) -> None:
        model.load_weights(stream)  # pyright: ignore[reportCallIssue]
        process(model)

    fields: dict[str, object] = {"load": load, "finish": process, "run": lambda model: model(*inputs)}
    return ForeignModel(make=make, **fields | more)  # pyright: ignore[reportArgumentType]


class ForeignLife:
    """One loaded module, and what it must hold.

    Attributes:
        model: the module.
        holds: checkpoint tensor name -> its present value.
        refusal: why nothing could be recorded; None when it was.
    """

    def __init__(self, subject: ForeignModel, checkpoint: Checkpoint) -> None:
        self.subject = subject
        self.model = cold(subject, checkpoint)
        self.holds = dict(checkpoint)
        self.refusal: str | None = None
        with torch.no_grad():
            self._out = torch.empty_like(subject.run(self.model))
        try:
            self._replay = Recording(lambda: self._out.copy_(subject.run(self.model))).replay
        except CannotCapture as why:
            self.refusal, self._replay = str(why), None
        self._census = pointer_census(self.model)
        self.check()

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """What it computes now."""
        return self.subject.run(self.model).clone()

    @torch.no_grad()
    def reload(self, checkpoint: Checkpoint) -> None:
        """A whole reload, and what must hold after it."""
        self.subject.load(self.model, stream(checkpoint))
        self.holds = dict(checkpoint)
        self.check()

    @torch.no_grad()
    def poison(self) -> None:
        """Every bit of every parameter set: NaN in floats. What the next load does not write will scream."""
        for param in self.model.parameters():
            param.data.view(-1).view(torch.uint8).fill_(255)

    def check(self) -> None:
        """Raises LawBroken with everything that does not hold."""
        expected = cold_logits(self.subject, self.holds)
        wrong = [] if same_bits(self.logits(), expected) else ["logits differ from a cold load's"]
        if self._replay is not None:
            self._replay()
            wrong += [] if same_bits(self._out, expected) else ["a replay of what was recorded before differs"]
        if self.subject.weights is not None:
            odd = _differing(self.subject.weights(self.model), self.holds)
            wrong += [f"what it holds is not the checkpoint's: {some(odd)}"] if odd else []
        gone = moved(self._census, pointer_census(self.model))
        wrong += [f"moved: {some(gone)}"] if gone else []
        expect(not wrong, "; ".join(wrong))


def stream(checkpoint: Checkpoint, names: Sequence[str] | None = None) -> Stream:
    """A checkpoint's tensors in its own order or in that of ``names``, each a copy that nobody else has."""
    return ((name, checkpoint[name].clone()) for name in names or checkpoint)


@torch.no_grad()
def cold(subject: ForeignModel, checkpoint: Checkpoint) -> nn.Module:
    """A new module with the weights of a checkpoint."""
    model = subject.make()
    subject.load(model, stream(checkpoint))
    return model


@torch.no_grad()
def cold_logits(subject: ForeignModel, checkpoint: Checkpoint) -> torch.Tensor:
    """What a cold load of a checkpoint computes."""
    return subject.run(cold(subject, checkpoint)).clone()


def _differing(held: Checkpoint, expected: Checkpoint) -> list[str]:
    """Names that are not in both with the same dtype, shape and bits."""
    return sorted(
        name
        for name in held.keys() | expected.keys()
        if name not in held
        or name not in expected
        or (held[name].dtype, held[name].shape) != (expected[name].dtype, expected[name].shape)
        or not same_bits(held[name], expected[name].to(held[name].device))
    )
