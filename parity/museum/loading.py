"""Exhibits: engines whose way of loading, swapping or pausing has one upstream bug each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from parity.foreign.live import Checkpoint, Stream
from parity.museum.engine import Engine
from parity.museum.layers import Part, Table
from parity.museum.parts import AdapterWithoutInterface, LinearAliasDerivedAgain


class ChecksNothing(Engine):
    """sglang #2322: no check before the first write; what fits of another model's sizes is written."""

    def check(self, staged: Checkpoint, *, is_whole: bool) -> None:
        for name, tensor in staged.items():
            kind = self.parts()[name]
            kind[0].place(kind[1], tensor)


class WritesAsItReads(Engine):
    """vLLM #48312: tensors are written while more of them are read, and a failure leaves two versions mixed."""

    def load_weights(self, weights: Stream) -> set[str]:
        seen = set()
        for name, tensor in weights:
            self.check({name: tensor}, is_whole=False)
            part, local = self.parts()[name]
            part.place(local, tensor)
            seen.add(name)
        if missing := self.lacking(seen):
            raise ValueError(missing)
        return seen


class RollsBackToTheNew(Engine):
    """sglang #30749, #30761: the path is replaced before the update, so a rollback reads what just failed."""

    def load_weights(self, weights: Stream) -> set[str]:
        read: dict[str, torch.Tensor] = {}
        try:
            for name, tensor in weights:
                read[name] = tensor.clone()
            self.stage(iter(read.items()))
            return self.commit(is_whole=True)
        except Exception:
            self.staged = {name: tensor for name, tensor in read.items() if name in self.parts()}
            self.commit(is_whole=False)
            raise


class KeepsWhatWasLent(Engine):
    """sglang #22715 and four more, vLLM #41749, #43163: a streamer's tensors are kept beyond their step."""

    def stage(self, weights: Stream) -> None:
        self.staged |= dict(weights)


class CountsInsteadOfNaming(Engine):
    """vLLM #48312: progress is a count, and a tensor that comes twice stands for one that does not come."""

    def load_weights(self, weights: Stream) -> set[str]:
        arrived = [(name, tensor.clone()) for name, tensor in weights]
        if len(arrived) != len(self.parts()):
            names = {name for name, _ in arrived}
            odd = sorted(names - self.parts().keys())
            raise ValueError(f"{len(arrived)} tensors; unexpected: {odd}{self.lacking(names)}")
        self.staged = dict(arrived)
        return self.commit(is_whole=False)


class PairsWithinOneCall(Engine):
    """sglang #38298, #14178: the halves of a pair are gathered in a dict of one call, and lost if they come in two."""

    @staticmethod
    def in_buckets(model: Any, parts: Iterable[Stream]) -> None:
        for part in parts:
            gathered = {name: tensor.clone() for name, tensor in part}
            whole = {
                name: tensor
                for name, tensor in gathered.items()
                if "gate_proj" not in name or name.replace("gate_proj", "up_proj") in gathered
            }
            model.stage(iter(whole.items()))
        model.commit(is_whole=False)
        for part in model.modules():
            if isinstance(part, Part):
                part.process_weights_after_loading()


class FinishesEveryBucket(Engine):
    """sglang #17107: post-processing in place after every bucket derives from what earlier buckets have derived."""

    kinds = {**Engine.kinds, "Linear": LinearAliasDerivedAgain}

    @staticmethod
    def in_buckets(model: Any, parts: Iterable[Stream]) -> None:
        for part in parts:
            model.stage(part)
            model.commit(is_whole=False)
            for module in model.modules():
                if isinstance(module, Part):
                    module.process_weights_after_loading()


class ServesWhatItCached(Engine):
    """vLLM #32718: a reload is answered from weights that an earlier one kept."""

    cached: dict[str, torch.Tensor] | None = None

    def commit(self, *, is_whole: bool) -> set[str]:
        self.check(self.staged, is_whole=is_whole)
        if self.cached is None:
            self.cached = dict(self.staged)
        self.staged = {name: self.cached[name] for name in self.staged}
        return super().commit(is_whole=is_whole)


class TiesByContent(Engine):
    """vLLM #51665: whether the head is the embedding is read off the values that a checkpoint happens to have."""

    def commit(self, *, is_whole: bool) -> set[str]:
        staged = self.staged
        done = super().commit(is_whole=is_whole)
        embed, head = (staged.get(f"{half}.weight") for half in ("embed_tokens", "lm_head"))
        if embed is not None and head is not None and torch.equal(embed, head):
            self.lm_head._parameters["weight"] = self.embed_tokens.get_parameter("weight")
        return done


class SwapsOnce(Engine):
    """sglang #26798: a swap deletes the weights first, and of a tied model the second ``del`` finds none."""

    is_tied = True

    def set_embed_and_head(self, embed: torch.Tensor, head: torch.Tensor) -> None:
        del self.embed_tokens.weight
        del self.lm_head.weight
        self.embed_tokens.weight = nn.Parameter(embed, requires_grad=False)
        self.lm_head.weight = nn.Parameter(head, requires_grad=False)


class SwapRebinds(Engine):
    """sglang #26798, not tied: the swap binds other tensors, which no graph reads."""

    def set_embed_and_head(self, embed: torch.Tensor, head: torch.Tensor) -> None:
        self.embed_tokens.weight = nn.Parameter(embed, requires_grad=False)
        self.lm_head.weight = nn.Parameter(head, requires_grad=False)


class WritesPastTheHook(Engine):
    """vLLM #57805: who copies into a parameter passes the hook by which what is derived is kept up with it."""

    @staticmethod
    def write(model: Any, name: str, tensor: torch.Tensor) -> None:
        part, local = model.parts()[name]
        part.place(local, tensor)


class StateMovesInAPause(Engine):
    """sglang #27140: state buffers are allocated anew after a pause; graphs go on in the old ones."""

    def wake(self) -> None:
        super().wake()
        self.state = self.state.clone()


class WrapsWithoutInterface(Engine):
    """sglang #22547: see ``AdapterWithoutInterface``."""

    def wrapped(self) -> list[tuple[nn.Module, nn.Module]]:
        assert isinstance(self.embed_tokens, Table)
        return [(AdapterWithoutInterface(self.embed_tokens), self.embed_tokens)]
