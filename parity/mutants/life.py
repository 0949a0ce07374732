"""The life of a weight on trial: load, refused and broken reloads, reload, swap, export, on one backend.

Every step has an answer that is owed bit for bit and known beforehand, from the files or from a model that was loaded
fresh by clean code. Stops at the first wrong answer, which is the finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from loaders import CheckpointError, open_checkpoint
from loaders.checkpoint import Checkpoint, aligned_empty
from loaders.reading import filling
from parity.mutants.bench import Bench, Subject, differences, load, logits


def life(bench: Bench, subject: Subject, backend: str) -> list[str]:
    """Everything a weight goes through; the first thing that goes wrong."""
    seeds = [bench.path(subject, seed) for seed in (0, 1)]
    for path in (
        *seeds,
        bench.swapped(subject),
    ):  # references: on a second run, with a bug planted, they are there already
        bench.on_disk(path)
        bench.clean_logits(path, subject, backend)
    finding = next(_Life(bench, subject, backend, *seeds).steps(), None)
    return [finding] if finding else []


class _Life:
    def __init__(self, bench: Bench, subject: Subject, backend: str, a: Path, b: Path) -> None:
        self.bench, self.subject, self.backend, self.a, self.b = bench, subject, backend, a, b
        self.batch = bench.short(subject)
        self.model: Any = None

    def steps(self) -> Iterator[str]:
        yield from self._positional_ids()
        self.model = load(self.backend, self.a)
        before = self._addresses()
        yield from self._is("after load", self.a)
        for what, cause in (("a renamed tensor", None), ("a read that fails half-way", _reads_break)):
            yield from self._refused(what, cause)
        yield from self._reload("reload over poison", self.b, poison=True)
        yield from self._reload("reload back", self.a)
        yield from self._swap()
        yield from self._reload("reload after a swap", self.a)
        if before != self._addresses():
            yield "a parameter moved: a captured graph would go on reading the old one"
        if self.backend == "torch":
            yield from self._faulty_write()

    def _positional_ids(self) -> Iterator[str]:
        target = np.zeros((2, 3), np.float32)
        try:
            filling.weight_loader(target, np.ones(3, np.float32), 1)  # pyright: ignore[reportCallIssue]
        except TypeError:
            return
        yield "a shard_id given by position was taken without a word"

    def _is(self, when: str, path: Path) -> Iterator[str]:
        """The live model is what loading ``path`` fresh gives: digests, and logits bit for bit, the draft's too."""
        yield from differences(when, self.bench.on_disk(path), self.model.digests())
        expected = self.bench.clean_logits(path, self.subject, self.backend)
        if not _same_bits(logits(self.model, self.batch), expected):
            yield f"{when}, logits are not those of a fresh load, although all digests are right"

    def _refused(self, what: str, cause: Callable[[], Any] | None) -> Iterator[str]:
        """A reload that cannot be done says so and leaves the old version serving, bit for bit."""
        version = self.model.version
        path = self.b if cause else self.bench.renamed(self.subject)
        try:
            with cause() if cause else _nothing():
                self.model.update_weights_from_disk(path)
        except CheckpointError:
            pass
        else:
            yield f"{what} was accepted"
        if self.model.version != version:
            yield f"after {what}, the version is {self.model.version}, not {version} as before"
        yield from self._is(f"after {what}", self.a)

    def _reload(self, when: str, path: Path, *, poison: bool = False) -> Iterator[str]:
        """Old caches are refused, nothing compiles, and (JAX) the version before still computes what it did."""
        old, compiled = self.model, _programs(self.model)
        old_logits = logits(old, self.batch)
        _, cache = self.model.prefill(**self.batch)
        version = self.model.version
        if poison:
            self.model = _poisoned(self.backend, self.model)
        self.model = self.model.update_weights_from_disk(path)
        if self.model.version <= version:
            yield f"{when}, the version is still {self.model.version}"
        is_compiled = _programs(self.model) == compiled
        yield from self._is(when, path)
        if not is_compiled or _programs(self.model) != compiled:
            yield f"{when}, programs are compiled again"
        try:
            self.model.decode(self.batch["input_ids"][:, -1], cache)
        except ValueError:
            pass
        else:
            yield f"{when}, a cache computed with the weights before was taken"
        if self.backend == "jax":
            try:
                intact = _same_bits(logits(old, self.batch), old_logits)
            except RuntimeError:  # its buffers are gone
                intact = False
            if not intact:
                yield f"{when}, the version before computes something else than it did"

    def _swap(self) -> Iterator[str]:
        """Embedding and head of seed 1 into the model of seed 0; then the caller goes on using its own buffers."""
        given = {half: self._buffer(name) for half, name in self._halves().items()}
        self.model = self.model.set_embed_and_head(**given)
        for buffer in given.values():
            buffer[...] = 0
        yield from self._is("after a swap", self.bench.swapped(self.subject))
        exported = self.model.export(self.bench._new("swapped"))
        yield from differences(
            "exported after a swap", self.bench.on_disk(self.bench.swapped(self.subject)), self.bench.on_disk(exported)
        )

    def _faulty_write(self) -> Iterator[str]:
        """A device that writes wrong bytes: no mixture may serve, until a good reload."""
        with _writes_break():
            try:
                self.model.update_weights_from_disk(self.b)
            except RuntimeError:
                pass
            else:
                yield "wrong bytes on the device were published"
        try:
            self.model(**self.batch)
        except RuntimeError:
            pass
        else:
            yield "after a failed write, a mixture of two versions serves"
        yield from self._reload_only("reload after a failed write", self.a)

    def _reload_only(self, when: str, path: Path) -> Iterator[str]:
        self.model = self.model.update_weights_from_disk(path)
        yield from self._is(when, path)

    def _halves(self) -> dict[str, str]:
        halves = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight"}
        held = open_checkpoint(self.b).tensors
        return {half: name for half, name in halves.items() if name in held}

    def _buffer(self, name: str) -> np.ndarray:
        value = open_checkpoint(self.b).read(name)
        buffer = aligned_empty(value.shape, value.dtype)  # of the alignment at which JAX on CPU would alias it
        buffer[...] = value
        return buffer

    def _addresses(self) -> Any:
        if self.backend == "jax":
            return None
        from torch_models.census import pointer_census

        return pointer_census(self.model)


def _same_bits(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> bool:
    pairs = zip(a, b, strict=True)
    return all((x.shape, x.dtype, x.tobytes()) == (y.shape, y.dtype, y.tobytes()) for x, y in pairs)


def _programs(model: Any) -> Any:
    """How many programs there are for a whole prompt; None where nothing is compiled."""
    return model.programs.forward_with_taps._cache_size() if hasattr(model, "programs") else None


def _poisoned(backend: str, model: Any) -> Any:
    """NaN everywhere, so that whatever a reload leaves out screams."""
    if backend == "torch":
        for param in model.parameters():
            param.data.fill_(float("nan"))
        return model
    import jax

    return model.replace(
        weights=jax.tree.map(lambda w: jax.device_put(np.full_like(w, np.nan), w.sharding), model.weights)
    )


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _reads_break() -> Iterator[None]:
    """Whatever is streamed ends in an error after half of the checkpoint's tensors."""
    stream, count = Checkpoint.stream, iter(range(1 << 30))

    def broken(self: Checkpoint, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for item in stream(self, *args, **kwargs):
            if next(count) >= len(self.tensors) // 2:
                raise CheckpointError(self.source, ["the disk is gone"])
            yield item

    with patch.object(Checkpoint, "stream", broken):
        yield


@contextmanager
def _writes_break() -> Iterator[None]:
    """The third tensor copied arrives with one value changed."""
    import torch

    copy, count = torch.Tensor.copy_, iter(range(1 << 30))

    def faulty(self: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        out = copy(self, source, *args, **kwargs)
        if next(count) == 2:
            self.view(-1)[0] += 1
        return out

    with patch.object(torch.Tensor, "copy_", faulty):
        yield
